"""Texts and images as padded rows of labelled tokens, as a model gets them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from monoblock.spec import ArchSpec, Learned
from monoblock.utils.labels import TokenLabels
from monoblock.utils.visibility import Batch, Bools, Ints

PADDING, PATCH, PATCH_ROW_END = "<pad>", "<img>", "<row>"


@dataclass(frozen=True)
class Tokens:
    """A batch: the `labels` of its rows, its padding and segments (`batch`), and the mask of image patches (b, k)."""

    labels: tuple[tuple[str, ...], ...]
    batch: Batch
    image_bk: Bools

    @property
    def length(self) -> int:
        """Tokens per row, including padding."""
        return self.image_bk.shape[1]


@dataclass(frozen=True)
class Reader:
    """Tokenizes texts with a tokenizer, and images with the processor of a model that takes them."""

    spec: ArchSpec
    tokenizer: Any
    processor: Any = None

    def read(self, texts: Sequence[str], images: Sequence[Any], side: str, segments: Any) -> Tokens:
        """The texts, each with its image (or None), padded on `side`."""
        rows = self._rows(texts, images)
        self._check([len(ids) for ids in rows])
        labels = TokenLabels(self.tokenizer)
        names = self._image_names()
        length = max(map(len, rows))

        def padded(row: Sequence[Any], fill: Any) -> list[Any]:
            pads = [fill] * (length - len(row))
            return [*row, *pads] if side == "right" else [*pads, *row]

        batch = Batch(
            np.array([padded([True] * len(ids), False) for ids in rows]),
            self._segments(segments, [len(ids) for ids in rows], padded),
        )
        return Tokens(
            tuple(tuple(padded([names.get(i) or labels(i) for i in ids], PADDING)) for ids in rows),
            batch,
            np.array([padded([names.get(i) == PATCH for i in ids], False) for ids in rows]),
        )

    def _rows(self, texts: Sequence[str], images: Sequence[Any]) -> list[list[int]]:
        """The ids of each text; in a batch with an image, the processor encodes every text."""
        if all(image is None for image in images):
            return [list(self.tokenizer(text)["input_ids"]) for text in texts]
        encoded = [self.processor([t], [i], return_tensors="np") for t, i in zip(texts, images, strict=True)]
        return [row["input_ids"][0].tolist() for row in encoded]

    def _image_names(self) -> Mapping[int, str]:
        if self.spec.patches is None:
            return {}
        names = {self.spec.patches.token_id: PATCH}
        if self.processor is not None:
            names |= {self.processor.image_newline_id: PATCH_ROW_END, self.processor.image_token_id: PATCH}
        return names

    def _check(self, lengths: Sequence[int]) -> None:
        """ValueError for inputs that the model itself would refuse."""
        if not all(lengths):
            raise ValueError(f"text {lengths.index(0)} has no tokens: pass at least one word")
        learned = self.spec.position(Learned)
        if learned is not None and (room := learned.size - learned.offset) < max(lengths):
            raise ValueError(
                f"the model has {room} learned positions, but the text has {max(lengths)} tokens: shorten it"
            )

    def _segments(self, segments: Any, lengths: Sequence[int], padded: Any) -> Ints | None:
        if segments is None:
            return None
        if not self.spec.attention.by_segment:
            raise ValueError(
                "sequence_id would have no effect: the config does not set attn_uses_sequence_id=True"
            )
        rows = [list(row) for row in segments]
        if [len(row) for row in rows] != list(lengths):
            raise ValueError(
                f"sequence_id must have an entry for every token of every text, {list(lengths)}, got "
                f"{[len(row) for row in rows]}"
            )
        return np.array([padded(row, -1) for row in rows])


def ranges(numbers: Sequence[int]) -> str:
    """Integers in short form: [0, 1, 2, 5] is "0-2, 5"."""
    groups = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
