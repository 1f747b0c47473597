"""Validation of labels, masks and positions of a forward pass, with the same error messages in every framework.

Values are NumPy arrays, as far as the host can read them without synchronising with a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from monoblock.spec import ArchSpec, Learned

IGNORED = -100  # label of positions without a target
MAX_POSITION = 2**24  # up to here, every integer is exact in float32, in which RoPE angles are computed


@dataclass(frozen=True)
class Labels:
    """An array of labels: argument name, shape (symbolic sizes are not ints), dtype name, and values if the host can
    read them."""

    name: str
    shape: Sequence[Any]
    dtype: str
    values: np.ndarray[Any, Any] | None


def check_classes(labels: Labels, scores: Sequence[Any]) -> None:
    """ValueError unless the labels match `scores` (..., classes): integers, one per row of scores, each a class or
    -100."""
    *rows, count = scores
    if _known(*labels.shape, *rows) and math.prod(labels.shape) != math.prod(rows):
        raise ValueError(f"{labels.name} must be {_words(rows)}, one class each, got {tuple(labels.shape)}")
    if "float" in labels.dtype or "complex" in labels.dtype:
        raise ValueError(
            f"{labels.name} must be integers, the classes 0 to {count - 1} or {IGNORED} for none, got "
            f"{labels.dtype}"
        )
    if (values := labels.values) is None or not _known(count):
        return
    real = values[values != IGNORED]
    if real.size and (real.min() < 0 or real.max() >= count):
        raise ValueError(
            f"{labels.name} must be 0 to {count - 1} ({IGNORED} stands for none), but go from {real.min()} to "
            f"{real.max()}"
        )


def check_tokens_have_labels(labels: Labels, scores: Sequence[Any]) -> None:
    """ValueError unless labels are (batch, tokens) with the number of rows of `scores` (batch, tokens, classes). The
    loss itself checks the number of tokens."""
    rows, tokens, _ = scores
    shape = tuple(labels.shape)
    if not _known(*shape, rows, tokens):
        return
    if len(shape) < 2 or math.prod(shape[:-1]) != rows or shape[-1] == 0:
        raise ValueError(f"labels must be (batch, tokens) = {_words((rows, tokens))}, got {shape}")


def check_token_positions(labels: Labels, rows: Any) -> None:
    """ValueError unless there is one integer per row, the index of a token; indices outside the sequence are
    ignored."""
    if _known(*labels.shape, rows) and math.prod(labels.shape) != rows:
        raise ValueError(
            f"{labels.name} must be ({rows},), one token position per row, got {tuple(labels.shape)}"
        )
    if "int" not in labels.dtype:
        raise ValueError(f"{labels.name} must be integers, positions of tokens, got {labels.dtype}")


def problem_of(labels: Labels, scores: Sequence[Any], problem_type: str | None) -> str:
    """The problem type of sequence labels for scores (rows, classes): the config's, else inferred from dtype and shape.
    ValueError: the number of labels does not match the scores."""
    whole = "float" not in labels.dtype
    found = problem_type
    if found is None:
        found = "single_label_classification" if whole else "multi_label_classification"
        found = "regression" if scores[-1] == 1 else found
    if not _known(*labels.shape, *scores):
        return found
    size, every = math.prod(labels.shape), math.prod(scores)
    if found != "single_label_classification":
        if size != every:
            raise ValueError(
                f"{labels.name} of a {found} must be {_words(scores)}, one number per class, got {tuple(labels.shape)}"
            )
    elif size == every != scores[0]:
        raise ValueError(
            f"{labels.name} {tuple(labels.shape)} hold one number per class, but the loss takes one class per row: "
            "for several classes per row set config.problem_type='multi_label_classification'"
            + (", or give floating-point labels" if problem_type is None else "")
        )
    return found


def check_mask(values: np.ndarray[Any, Any]) -> None:
    """ValueError for an attention mask (batch, tokens) with negative, NaN or complex values."""
    if not values.size or values.dtype == bool:
        return
    if np.iscomplexobj(values):
        got = "complex numbers"
    elif values.min() >= 0:  # false for NaN
        return
    else:
        got = "NaN" if np.isnan(values).any() else values.min()
    raise ValueError(f"attention_mask (batch, tokens) must be 1 for tokens and 0 for padding, got {got}")


def check_positions(spec: ArchSpec, low: int, high: int) -> None:
    """ValueError for position ids between `low` and `high` that are negative with a learned table, or too large for
    exact angles. Ids beyond the end of a table are checked elsewhere."""
    learned = spec.position(Learned)
    if learned is not None and low < 0:
        raise ValueError(
            f"position_ids must be 0 to {learned.size - 1}, the rows of the position table, got {low}; at padding "
            "any of them is valid: clamp them at 0"
        )
    if max(-low, high) > MAX_POSITION:
        raise ValueError(
            f"position_ids must be at most {MAX_POSITION}, up to which integers are exact in fp32, got "
            f"{high if high > MAX_POSITION else low}"
        )


def _known(*sizes: Any) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _words(sizes: Sequence[Any]) -> str:
    return "(" + ", ".join(str(size) for size in sizes) + ("," if len(sizes) == 1 else "") + ")"
