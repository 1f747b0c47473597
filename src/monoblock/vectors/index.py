"""Read an index: its vectors in blocks, its texts by row, its description. Memory is bounded by a block.

Vectors of int8 are directions: each row has a scale of its own, which the file does not tell, so they have a cosine
only.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from monoblock.checkpoint.files import read_json
from monoblock.vectors import parquet
from monoblock.vectors.outputs import beside, output_format

BLOCK_BYTES = 32 << 20  # of vectors in memory

Item = TypeVar("Item")


class Index:
    """The vectors of texts, in one of the formats of `outputs.py`.

    `description` says how they were made; it is empty for files that other programs wrote.
    """

    def __init__(self, path: Path, width: int, description: dict[str, Any]) -> None:
        self.path, self.width, self.description = path, width, description

    def blocks(self) -> Iterator[np.ndarray]:
        """All vectors in order, in blocks [rows, width] of float32."""
        raise NotImplementedError

    def texts(self, rows: Collection[int]) -> dict[int, str]:
        """The texts of these rows, counted from 0."""
        raise NotImplementedError


class NpyIndex(Index):
    """A .npy file and its texts beside it."""

    def __init__(self, path: Path, description: dict[str, Any]) -> None:
        try:
            array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path} is no valid .npy file: {error}") from None
        known = array.dtype.kind == "f" or array.dtype == np.int8
        if array.ndim != 2 or not known or not array.flags.c_contiguous:
            raise ValueError(
                f"{path} holds an array {array.shape} of {array.dtype}; expected floats or int8 [texts, width], row by "
                "row"
            )
        if array.dtype == np.int8:
            similarity = description.get("similarity") or "cosine"
            if similarity != "cosine":
                raise ValueError(f"{path} holds vectors of int8, which have a cosine, but no {similarity}")
            description = {**description, "similarity": similarity}
        self._shape, self._dtype, self._offset = array.shape, array.dtype, array.offset
        lines = beside(path, "texts.jsonl")
        if not lines.is_file():
            raise FileNotFoundError(f"{lines} with the texts is missing: keep it beside {path.name}")
        count, size = description.get("count", array.shape[0]), description.get("text_bytes")
        if count != array.shape[0] or (size is not None and size != lines.stat().st_size):
            raise ValueError(f"{path}, {lines.name} and the index.json beside them are of different runs")
        super().__init__(path, int(array.shape[1]), description)

    def blocks(self) -> Iterator[np.ndarray]:
        count, width = self._shape
        size = max(1, BLOCK_BYTES // (width * self._dtype.itemsize))
        for start in range(0, count, size):
            # One map per block: a map of the whole file would keep all pages that were read in memory.
            shape = (min(size, count - start), width)
            offset = self._offset + start * width * self._dtype.itemsize
            block = np.memmap(self.path, self._dtype, "r", offset, shape)
            yield np.asarray(block).astype(np.float32, copy=False)

    def texts(self, rows: Collection[int]) -> dict[int, str]:
        path = beside(self.path, "texts.jsonl")
        with path.open("rb") as lines:
            return {row: _text(path, row, line) for row, line in _picked(path, lines, rows)}


class JsonlIndex(Index):
    """A .jsonl file."""

    def __init__(self, path: Path, description: dict[str, Any]) -> None:
        with path.open("rb") as lines:
            first = next(lines, None)
        if first is None:
            raise ValueError(f"{path} is empty")
        super().__init__(path, _vector(path, 0, first).size, description)

    def blocks(self) -> Iterator[np.ndarray]:
        size, start = max(1, BLOCK_BYTES // (self.width * 4)), 0
        with self.path.open("rb") as lines:
            while some := list(islice(lines, min(size, 1024))):
                yield np.stack(
                    [_vector(self.path, start + i, line, self.width) for i, line in enumerate(some)]
                )
                start += len(some)

    def texts(self, rows: Collection[int]) -> dict[int, str]:
        with self.path.open("rb") as lines:
            return {row: _text(self.path, row, line) for row, line in _picked(self.path, lines, rows)}


class ParquetIndex(Index):
    """A .parquet file."""

    def __init__(self, path: Path) -> None:
        raw = parquet.description(path)
        width = parquet.width(path)
        if width is None:
            first = next(parquet.vectors(path), None)
            width = 0 if first is None else first.shape[1]
        super().__init__(path, width, {} if raw is None else json.loads(raw))

    def blocks(self) -> Iterator[np.ndarray]:
        return parquet.vectors(self.path)

    def texts(self, rows: Collection[int]) -> dict[int, str]:
        found = dict(_picked(self.path, parquet.texts(self.path, "text"), rows))
        return {row: value if isinstance(value, str) else "" for row, value in found.items()}


def open_index(path: Path) -> Index:
    """The index in a file. ValueError or OSError if it is none, or a file beside it is missing."""
    kind = output_format(path)
    if not path.is_file():
        unfinished = beside(path, "partial.json").exists()
        hint = "its run is not finished: repeat the command that began it" if unfinished else "no such file"
        raise FileNotFoundError(f"{path}: {hint}")
    if kind == ".parquet":
        return ParquetIndex(path)
    about = beside(path, "index.json")
    description = read_json(about) if about.is_file() else {}
    return NpyIndex(path, description) if kind == ".npy" else JsonlIndex(path, description)


def _picked(path: Path, items: Iterable[Item], rows: Collection[int]) -> Iterator[tuple[int, Item]]:
    """The items with these numbers; ValueError if there are fewer."""
    left = set(rows)
    for row, item in enumerate(items):
        if not left:
            return
        if row in left:
            left.remove(row)
            yield row, item
    if left:
        raise ValueError(f"{path} has no text for row {min(left)}")


def _row(path: Path, row: int, line: bytes) -> dict[str, Any]:
    try:
        found: object = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {row + 1}: no JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}, line {row + 1}: expected a JSON object, found {type(found).__name__}")
    return cast("dict[str, Any]", found)


def _text(path: Path, row: int, line: bytes) -> str:
    found = _row(path, row, line).get("text")
    if not isinstance(found, str):
        raise ValueError(f"{path}, line {row + 1}: expected a string in 'text'")
    return found


def _vector(path: Path, row: int, line: bytes, width: int | None = None) -> np.ndarray:
    found = _row(path, row, line).get("embedding")
    try:
        vector = np.array(found, np.float32)
    except (TypeError, ValueError):
        vector = np.zeros(0)
    if vector.ndim != 1 or not vector.size or vector.size != (width or vector.size):
        expected = "a list of numbers" if width is None else f"a list of {width} numbers"
        raise ValueError(f"{path}, line {row + 1}: expected {expected} in 'embedding'")
    return vector
