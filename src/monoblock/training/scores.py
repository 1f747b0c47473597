"""Metrics of predictions, in NumPy."""

from __future__ import annotations

import numpy as np


def single_label(predicted: np.ndarray, targets: np.ndarray, labels: int) -> dict[str, float]:
    """Accuracy, and the mean over the labels of F1 (macro); labels that occur in neither do not count."""
    per_label = [
        _f1(
            int(((predicted == i) & (targets == i)).sum()),
            int((predicted == i).sum()),
            int((targets == i).sum()),
        )
        for i in range(labels)
        if ((predicted == i) | (targets == i)).any()
    ]
    return {"accuracy": float((predicted == targets).mean()), "f1": float(np.mean(per_label))}


def multi_label(predicted: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Accuracy: the part of the examples whose labels are all right; F1 over all labels (micro)."""
    return {
        "accuracy": float((predicted == targets).all(-1).mean()),
        "f1": _f1(int((predicted & targets).sum()), int(predicted.sum()), int(targets.sum())),
    }


def regression(predicted: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Mean squared error, and the correlation of values (Pearson) and of ranks (Spearman)."""
    x, y = predicted.ravel().astype(np.float64), targets.ravel().astype(np.float64)
    return {
        "mse": float(np.square(x - y).mean()),
        "pearson": correlation(x, y),
        "spearman": correlation(ranks(x), ranks(y)),
    }


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; 0 if one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt(np.square(x).sum() * np.square(y).sum()))
    return float((x * y).sum() / scale) if scale else 0.0


def ranks(x: np.ndarray) -> np.ndarray:
    """The rank of each value from 0; equal values have the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[inverse]


def _f1(right: int, predicted: int, targets: int) -> float:
    return 2 * right / (predicted + targets) if predicted + targets else 0.0
