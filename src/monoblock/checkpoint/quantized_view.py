"""A store whose quantised matrices appear as the components of this library's formats, or dequantised."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from monoblock.checkpoint import casts
from monoblock.checkpoint.array_adapters import adapter
from monoblock.checkpoint.packed import Array, PackedForm
from monoblock.checkpoint.weights import Tensors


class QuantizedView(ABC):
    """Base of the readers of other tools' matrices. A derived class fills `shapes`, `forms` and `names`."""

    codes_end: str  # of the name of a matrix's codes

    def __init__(self, tensors: Tensors, framework: str):
        self.tensors, self._arrays = tensors, adapter(framework)
        self.shapes: dict[str, tuple[int, int]] = {}  # (outputs, inputs) of each matrix
        self.forms: dict[str, PackedForm] = {}  # of the matrices that stay packed
        # Name -> the matrix and the component, or None: as stored.
        self.parts: dict[str, tuple[str, str] | None] = {}

    @abstractmethod
    def component(self, stem: str, form: PackedForm, part: str) -> Array:
        """The codes, scale or low of a matrix in a format."""

    @abstractmethod
    def dequantised(self, stem: str) -> Array:
        """The matrix in bfloat16 (outputs, inputs), as 16-bit integers."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, a component or a dequantised matrix."""
        if (found := self.parts[name]) is None:
            return self.tensors.shape(name)
        stem, part = found
        return self.shapes[stem] if part == "weight" else self.forms[stem].shape(part, self.shapes[stem])

    def dtype(self, name: str) -> str:
        """Its dtype, by safetensors' name."""
        if (found := self.parts[name]) is None:
            return self.tensors.dtype(name)
        stem, part = found
        return "BF16" if part == "weight" else self.forms[stem].dtype(part)

    def path(self, name: str) -> Path:
        """The file that holds it."""
        found = self.parts[name]
        return self.tensors.path(name if found is None else f"{found[0]}{self.codes_end}")

    def tensor(self, name: str) -> Any:
        """The tensor itself."""
        if (found := self.parts[name]) is None:
            return self.tensors.tensor(name)
        stem, part = found
        made = self.dequantised(stem) if part == "weight" else self.component(stem, self.forms[stem], part)
        return self._arrays.from_buffer(made, self.dtype(name), made.shape)

    def inputs(self, name: str) -> int:
        """The inputs of the quantised matrix `X.weight`, without padding."""
        return self.shapes[name.removesuffix(".weight")][1]


def as_array(tensor: Any) -> Array:
    """A framework's tensor as a NumPy array; bfloat16 as float32."""
    if isinstance(tensor, np.ndarray):
        array: Any = cast("Any", tensor)
        return casts.widened(array) if casts.dtype_of(array) == "BF16" else array
    return (tensor.float() if str(tensor.dtype).endswith("bfloat16") else tensor).numpy()
