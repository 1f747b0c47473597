"""Examples as the tensors of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monoblock.spec import Learned
from monoblock.training.padding import padded
from monoblock.training.tasks.base import Example, TokenRow


def inputs(
    rows: Sequence[Sequence[TokenRow]], model: Any, pad: int, length: int | None = None
) -> tuple[dict[str, Any], Tensor | None]:
    """The arguments of the model for rows of one or several packed texts, padded on the right to `length` or to the
    longest, and the labels of their tokens (rows, tokens). Positions restart at each text of a packed row, which
    separates it from the others."""
    found = padded(rows, pad, length)
    spec, device = model.spec, model.device

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    given: dict[str, Any] = {"input_ids": tensor(found.ids)}
    if not found.mask.all():
        given["attention_mask"] = tensor(found.mask)
    if any(len(row) > 1 for row in rows):
        learned = spec.position(Learned)
        given["position_ids"] = tensor(found.positions + (learned.offset if learned else 0))
    if spec.attention.by_segment:
        given["sequence_id"] = tensor(found.documents)
    return given, None if found.labels is None else tensor(found.labels)


def targets(
    units: Sequence[Sequence[Example]], names: Sequence[str], device: torch.device
) -> dict[str, Tensor]:
    """The targets of whole rows by the model's arguments: one, or a tuple of as many as there are names."""
    values = [unit[0].target for unit in units]
    columns = [values] if len(names) == 1 else zip(*values, strict=True)
    return {name: torch.tensor(column, device=device) for name, column in zip(names, columns, strict=True)}
