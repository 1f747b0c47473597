"""Rows of examples as the arrays of one batch, for every framework."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from monoblock.training.tasks.base import IGNORED, TokenRow


@dataclass(frozen=True)
class PaddedRows:
    """Rows padded on the right, arrays (rows, tokens): ids, the mask of real tokens, positions that restart at each
    text of a packed row, the number of each text in its row, and labels if all texts have some."""

    ids: np.ndarray
    mask: np.ndarray
    positions: np.ndarray
    documents: np.ndarray
    labels: np.ndarray | None


def pad_id(tokenizer: Any) -> int:
    """The token that fills rows: the tokenizer's, else its end of text, else 0; the mask hides it."""
    pad = tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    return 0 if pad is None else int(pad)


def padded(rows: Sequence[Sequence[TokenRow]], pad: int, length: int | None = None) -> PaddedRows:
    """The arrays of rows of one or several packed texts, with `length` tokens, or as many as the longest."""
    counts = [sum(len(text.ids) for text in row) for row in rows]
    shape = (len(rows), length or max(counts))
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
    return PaddedRows(ids, mask, positions, documents, labels if labelled else None)
