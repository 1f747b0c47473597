"""Tensors of a pickled file, by name, over its memory map."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from monoblock.checkpoint.array_adapters import Array, adapter


class PickledTensors:
    """PyTorch tensors of one file, returned as NumPy arrays over the same memory."""

    def __init__(self, tensors: Mapping[str, Any], path: Path):
        self._tensors = tensors
        self._path = path

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        return adapter("pt").describe(name, self._tensors[name]).dtype

    def path(self, name: str) -> Path:
        del name
        return self._path

    def tensor(self, name: str) -> Array:
        raw = adapter("pt").raw(self._tensors[name])
        return adapter("np").from_buffer(raw, self.dtype(name), self.shape(name))
