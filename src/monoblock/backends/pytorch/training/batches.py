"""Examples as the tensors of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monoblock.spec import Learned
from monoblock.training.tasks.base import IGNORED, Example, TokenRow


def inputs(rows: Sequence[Sequence[TokenRow]], model: Any, pad: int) -> tuple[dict[str, Any], Tensor | None]:
    """The arguments of the model for rows of one or several packed texts, padded on the right, and the labels of their
    tokens (rows, tokens). Positions restart at each text of a packed row, which separates it from the others."""
    counts = [sum(len(text.ids) for text in row) for row in rows]
    shape = (len(rows), max(counts))
    ids = np.full(shape, pad, dtype=np.int64)
    mask, positions, documents = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    labels = np.full(shape, IGNORED, dtype=np.int64)
    labelled = all(text.labels is not None for row in rows for text in row)
    for number, row in enumerate(rows):
        start = 0
        for document, text in enumerate(row):
            span = (number, slice(start, start + len(text.ids)))
            ids[span], mask[span], documents[span] = text.ids, 1, document
            positions[span] = np.arange(len(text.ids))
            if text.labels is not None:
                labels[span] = text.labels
            start += len(text.ids)
    spec, device = model.spec, model.device

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    given: dict[str, Any] = {"input_ids": tensor(ids)}
    if min(counts) != shape[1]:
        given["attention_mask"] = tensor(mask)
    if any(len(row) > 1 for row in rows):
        learned = spec.position(Learned)
        given["position_ids"] = tensor(positions + (learned.offset if learned else 0))
    if spec.attention.by_segment:
        given["sequence_id"] = tensor(documents)
    return given, tensor(labels) if labelled else None


def targets(
    units: Sequence[Sequence[Example]], names: Sequence[str], device: torch.device
) -> dict[str, Tensor]:
    """The targets of whole rows by the model's arguments: one, or a tuple of as many as there are names."""
    values = [unit[0].target for unit in units]
    columns = [values] if len(names) == 1 else zip(*values, strict=True)
    return {name: torch.tensor(column, device=device) for name, column in zip(names, columns, strict=True)}
