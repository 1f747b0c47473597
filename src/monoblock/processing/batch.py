"""The output of Fuyu's processors: arrays of one framework, some of them in lists."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import numpy as np

from monoblock.tokenization.encoding import BatchEncoding
from monoblock.tokenization.tensors import CONVERTERS, converter


class FuyuBatchEncoding(BatchEncoding):
    """`input_ids`, `attention_mask`, `image_patches`, ... by key or as attributes.

    `image_patches` is a list of arrays, one per sample, because images of different sizes have different numbers of
    patches; `convert_to_tensors` and `to` convert the arrays in such lists.
    """

    def convert_to_tensors(self, tensor_type: Any = None, prepend_batch_axis: bool = False) -> Self:
        """Arrays and lists of numbers to arrays of "pt", "np", "jax" or "tf", in place; lists of arrays stay lists."""
        if tensor_type is None:
            return self
        numbers, arrays = converter(tensor_type), array_converter(tensor_type)
        for key, value in self.data.items():
            value = [value] if prepend_batch_axis else value
            self.data[key] = _mapped(value, arrays) if _holds_arrays(value) else numbers(key, value)
        return self

    def to(self, device: Any = None, dtype: Any = None, *, non_blocking: bool = False) -> Self:
        """Move the PyTorch tensors to a device and cast the floating-point ones, in place, also those in lists.

        Args:
            device: "cpu", "cuda:0", an index or a `torch.device`; None leaves the tensors on their device.
            dtype: a `torch.dtype`, for patches only: ids, indices and masks keep their dtype. `to(dtype)` works too.
        """
        if _is_dtype(device):
            device, dtype = (None if dtype is None else dtype), device
        if dtype is not None and not _is_dtype(dtype):
            raise TypeError(f"to() takes a device and a torch.dtype; got {dtype!r} as dtype")
        if device is not None and not isinstance(device, str | int) and type(device).__name__ != "device":
            raise TypeError(f"to() takes a device and a torch.dtype; got {device!r} as device")
        moved: list[Any] = []

        def move(value: Any) -> Any:
            if not callable(getattr(value, "to", None)):
                return value
            moved.append(value)
            cast_to = dtype if value.is_floating_point() else None
            return value.to(device=device, dtype=cast_to, non_blocking=non_blocking)

        self.data = {key: _mapped(value, move) for key, value in self.data.items()}
        if not moved:
            raise ValueError(
                'to() moves PyTorch tensors, and there are none: call the processor with return_tensors="pt"'
            )
        return self


def array_converter(tensor_type: Any) -> Callable[[Any], Any]:
    """A function from NumPy arrays to arrays of a framework, without the conversion to lists of the tokenizers.

    ValueError for an unknown framework, ImportError with the pip command for a missing one.
    """
    converter(tensor_type)  # raises both errors
    row = CONVERTERS[str(getattr(tensor_type, "value", tensor_type))]
    module = importlib.import_module(row.module)

    def convert(value: Any) -> Any:
        return row.make(module, value) if isinstance(value, np.ndarray | np.generic | int | float) else value

    return convert


def stacked(value: Any) -> Any:
    """Nested lists of numbers and arrays as one array, or as lists of arrays where the shapes differ."""
    if not isinstance(value, list | tuple):
        return np.asarray(value, np.float32 if isinstance(value, float) else None)
    items = [stacked(item) for item in cast("Sequence[Any]", value)]
    shapes = {getattr(item, "shape", None) for item in items}  # None: a list of arrays of different shapes
    return np.stack(items) if len(shapes) == 1 and None not in shapes else items


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in cast("Sequence[Any]", value)]
    return change(value)


def _holds_arrays(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_holds_arrays(item) for item in cast("Sequence[Any]", value))
    return hasattr(value, "shape")


def _is_dtype(value: Any) -> bool:
    return type(value).__name__ == "dtype"
