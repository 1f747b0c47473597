"""What can be wrong with a call's labels, masks and positions, in every framework alike: each fault is one sentence.

Values are NumPy's: what the host can read without waiting for a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from monoblock.spec import ArchSpec, Learned

IGNORED = -100  # the label of a place that has none
MAX_POSITION = 2**24  # position up to which all whole numbers are float32 numbers, of which angles are made


@dataclass(frozen=True)
class Labels:
    """An array of labels: its argument's name, its shape (what is open of it is no int), the name of its dtype, and its
    values where the host can read them."""

    name: str
    shape: Sequence[Any]
    dtype: str
    values: np.ndarray[Any, Any] | None


def check_classes(labels: Labels, scores: Sequence[Any]) -> None:
    """ValueError unless there is a class for each of the `scores` (..., classes): as many labels, whole numbers, each a
    class or -100."""
    *rows, count = scores
    if _known(*labels.shape, *rows) and math.prod(labels.shape) != math.prod(rows):
        raise ValueError(f"{labels.name} must be {_words(rows)}, a class for each, got {tuple(labels.shape)}")
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
    """ValueError unless labels have an axis of tokens, and as many of it as the `scores` (rows, tokens, classes), but
    for the number of tokens in a row, of which the loss itself speaks."""
    rows, tokens, _ = scores
    shape = tuple(labels.shape)
    if not _known(*shape, rows, tokens):
        return
    if len(shape) < 2 or math.prod(shape[:-1]) != rows or shape[-1] == 0:
        raise ValueError(f"labels must be (batch, tokens) = {_words((rows, tokens))}, got {shape}")


def check_token_positions(labels: Labels, rows: Any) -> None:
    """ValueError unless there is a whole number for each row, the place of a token; those outside the text count as
    none."""
    if _known(*labels.shape, rows) and math.prod(labels.shape) != rows:
        raise ValueError(f"{labels.name} must be ({rows},), a place for each row, got {tuple(labels.shape)}")
    if "int" not in labels.dtype:
        raise ValueError(f"{labels.name} must be integers, positions of tokens, got {labels.dtype}")


def problem_of(labels: Labels, scores: Sequence[Any], problem_type: str | None) -> str:
    """The problem type of labels for rows, scores (rows, classes): as the config has it, else by the labels of this
    call. ValueError: they are of another number than the scores."""
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
                f"{labels.name} of a {found} must be {_words(scores)}, a number for each, got {tuple(labels.shape)}"
            )
    elif size == every != scores[0]:
        raise ValueError(
            f"{labels.name} {tuple(labels.shape)} hold a number for each class, but the loss takes one class a row: "
            "for several classes a row set config.problem_type='multi_label_classification'"
            + (", or give floating-point labels" if problem_type is None else "")
        )
    return found


def check_mask(values: np.ndarray[Any, Any]) -> None:
    """ValueError for a mask of keys that holds numbers which stand neither for tokens nor for padding."""
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
    """ValueError for position ids, which go from `low` to `high`, of which the model can make nothing. A table that
    ends before the highest is told of elsewhere."""
    learned = spec.position(Learned)
    if learned is not None and low < 0:
        raise ValueError(
            f"position_ids must be 0 to {learned.size - 1}, the rows of the model's table, got {low}; at padding "
            "any of them will do: clamp them at 0"
        )
    if max(-low, high) > MAX_POSITION:
        raise ValueError(
            f"position_ids must be at most {MAX_POSITION}, the last that fp32 tells from the next, got "
            f"{high if high > MAX_POSITION else low}"
        )


def _known(*sizes: Any) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _words(sizes: Sequence[Any]) -> str:
    return "(" + ", ".join(str(size) for size in sizes) + ("," if len(sizes) == 1 else "") + ")"
