"""The protocol of the array functions that the shared code takes as an argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from monoblock.generation.arrays import ArrayOps

Array = Any  # an array of the framework, or of NumPy where documented
Size = Any  # an int, or the symbolic size of a dynamic axis


class Namespace(ArrayOps, Protocol):
    """Functions on a framework's arrays, which may be traced: `ArrayOps` of generation, some of them along any axis,
    and more. JAX's return NumPy arrays if all operands are NumPy arrays."""

    def values(self, x: Array, *, wait: bool = False) -> np.ndarray[Any, Any] | None:
        """The values on the host; None for traced arrays, and for arrays on another device unless `wait` (a
        transfer)."""
        ...

    def size(self, x: Array, axis: int) -> Size:
        """The size of an axis."""
        ...

    def int32(self, x: Any) -> Array:
        """The array as int32."""
        ...

    def cast(self, x: Array, dtype: Any) -> Array:
        """The array in that dtype or dtype name."""
        ...

    def full(self, shape: tuple[Size, ...], value: int | bool) -> Array:
        """An int32 or boolean array of that value."""
        ...

    def arange(self, count: Size) -> Array:
        """0 to count - 1 as int32."""
        ...

    def minimum(self, x: Any, y: Any) -> Array:
        """The elementwise minimum."""
        ...

    def maximum(self, x: Any, y: Any) -> Array:
        """The elementwise maximum."""
        ...

    def cumsum(self, x_bk: Array, axis: int = -1) -> Array:
        """The cumulative sum along an axis, in the same dtype."""
        ...

    def sum(self, x_bk: Array, axis: int = -1) -> Array:
        """The sum along an axis, which is kept with size 1; of booleans, the count of True."""
        ...

    def mean(self, x: Array, axis: int) -> Array:
        """The mean along an axis, which is kept with size 1."""
        ...

    def shifted(self, x: Array, by: int, axis: int) -> Array:
        """The array shifted by `by` along an axis (`y[i] = x[i - by]`), zeros first."""
        ...

    def first_true(self, x: Array) -> Array:
        """The index of the first True along the last axis, as int32 (..., 1); 0 if there is none."""
        ...

    def pad(self, x: Array, before: Size, after: Size) -> Array:
        """(rows, columns) padded with columns of zeros."""
        ...

    def stacked(self, arrays: Sequence[Array]) -> Array:
        """Concatenate along the first axis."""
        ...

    def gather(self, x: Array, index: Array, axis: int = 1) -> Array:
        """`x[:, index]`, or along another axis."""
        ...

    def cut(self, x: Array, first: Any, count: Size) -> Array:
        """`x[..., first : first + count]`; `first` may be traced."""
        ...

    def columns(self, x: Array, first: Any, count: Size) -> Array:
        """The same along the second axis; compiled once for all values of `first`."""
        ...


def is_integer(x: Array) -> bool:
    """Whether the dtype is an integer type; bool is not."""
    return "int" in x.dtype.name


def is_floating(x: Array) -> bool:
    """Whether the dtype is a floating-point type."""
    return "float" in x.dtype.name


def is_static(*sizes: Size) -> bool:
    """Whether all sizes are static."""
    return all(isinstance(size, int) for size in sizes)


def shapes_match(shape: Sequence[Size], *expected: Size) -> bool:
    """Whether a shape matches the expected one, as far as both are static."""
    pairs = zip(shape, expected, strict=False)
    return len(shape) == len(expected) and all(not is_static(a, b) or a == b for a, b in pairs)


def shape_text(*sizes: Size) -> str:
    """Sizes for a message; ? for a dynamic axis."""
    return "(" + ", ".join(str(size) if is_static(size) else "?" for size in sizes) + ")"
