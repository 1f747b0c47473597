"""Names of labels, and the number of a label of a record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monoblock.field_types import brief
from monoblock.training.data import Record

MAX_LABELS = 100_000


def label_names(values: Sequence[Any], path: str) -> list[str]:
    """The names of the labels of training data: integers count up from 0, names are sorted. ValueError: there are fewer
    than two."""
    numbers = [int(value) for value in values if isinstance(value, int) or value.isdecimal()]
    if len(numbers) == len(values):
        wrong = [number for number in numbers if not 0 <= number < MAX_LABELS]
        if wrong:
            raise ValueError(
                f"{path}: integer labels count up from 0 and are below {MAX_LABELS:,}, got {wrong[0]}"
            )
        found = [f"LABEL_{i}" for i in range(max(numbers, default=-1) + 1)]
    else:
        found = sorted({str(value) for value in values})
    if len(found) < 2:
        raise ValueError(f"{path}: classification needs at least two different labels, found {len(found)}")
    return found


def label_index(names: Sequence[str], value: Any, record: Record) -> int:
    """The number of a label, which is a name or a number. ValueError: it is none of the names."""
    text = str(value)
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    raise record.error(f"the label {brief(value)} is none of the {len(names)} known ones ({known})")
