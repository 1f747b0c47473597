"""Metrics of predictions, in NumPy."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence

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


def retrieval(
    queries: np.ndarray, texts: np.ndarray, relevant: Sequence[Sequence[int]], block: int = 256
) -> dict[str, float]:
    """Search for the relevant texts of each query, all by cosine similarity: the mean part of them among the first 1
    and 10 (recall@1, recall@10), and the mean of 1 / rank of the first one (mrr). `queries` (q, width), `texts`
    (t, width); `relevant`: indices of texts for each query, at least one. Among equal similarities the relevant texts
    come last, so that vectors that are all the same score low."""
    queries, texts = unit(queries), unit(texts)
    recall, first = {1: 0.0, 10: 0.0}, 0.0
    for start in range(0, len(queries), block):
        for found, own in zip(
            queries[start : start + block] @ texts.T, relevant[start : start + block], strict=True
        ):
            best = np.sort(found[list(own)])[::-1]
            others = np.delete(found, list(own))
            rank = 1 + np.arange(len(best)) + (others >= best[:, None]).sum(-1)
            first += 1 / rank[0]
            for k in recall:
                recall[k] += (rank <= k).mean()
    return {
        **{f"recall@{k}": float(x / len(queries)) for k, x in recall.items()},
        "mrr": first / len(queries),
    }


def unit(x: np.ndarray) -> np.ndarray:
    """Vectors (n, width) scaled to length 1; zeros stay."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def spans(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> dict[str, float]:
    """Accuracy of the tags of (predicted, right) sequences; and, if any tag begins with "B-" or "I-", precision, recall
    and F1 of the entities, as conlleval counts them (Tjong Kim Sang, 2002)."""
    right = sum(a == b for one, other in pairs for a, b in zip(one, other, strict=True))
    found = {"accuracy": right / max(1, sum(len(one) for one, _ in pairs))}
    if not any(tag[:2] in ("B-", "I-") for _, other in pairs for tag in other):
        return found
    hits = predicted = targets = 0
    for one, other in pairs:
        own, wanted = set(entities(one)), set(entities(other))
        hits, predicted, targets = hits + len(own & wanted), predicted + len(own), targets + len(wanted)
    return {
        **found,
        "precision": hits / predicted if predicted else 0.0,
        "recall": hits / targets if targets else 0.0,
        "f1": _f1(hits, predicted, targets),
    }


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The kind, the first tag and the end of each entity of B- and I- tags. An I- tag after another kind begins one."""
    found: list[tuple[str, int, int]] = []
    kind, start = "", 0
    for i, tag in enumerate([*tags, "O"]):
        mark, _, own = tag.partition("-") if tag[:2] in ("B-", "I-") else ("O", "", "")
        if kind and (mark != "I" or own != kind):
            found.append((kind, start, i))
            kind = ""
        if mark != "O" and not kind:
            kind, start = own, i
    return found


def answers(pairs: Sequence[tuple[str, Sequence[str]]]) -> dict[str, float]:
    """Exact match and F1 of the words of (predicted, right answers), the best of the right ones; "" is no answer. As
    SQuAD's evaluation normalises: lower case, without punctuation and English articles."""
    exact = [max(_normalised(one) == _normalised(other) for other in right) for one, right in pairs]
    f1 = [max(_overlap(_normalised(one), _normalised(other)) for other in right) for one, right in pairs]
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}


def _normalised(text: str) -> list[str]:
    letters = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in letters.split() if word not in ("a", "an", "the")]


def _overlap(one: Sequence[str], other: Sequence[str]) -> float:
    """F1 of two bags of words; of two empty ones 1."""
    if not one or not other:
        return float(one == other)
    return _f1((Counter(one) & Counter(other)).total(), len(one), len(other))


def _f1(right: int, predicted: int, targets: int) -> float:
    return 2 * right / (predicted + targets) if predicted + targets else 0.0
