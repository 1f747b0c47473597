"""The array functions that the code of both frameworks is given, as a protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from monoblock.generation.arrays import ArrayOps

Array = Any  # an array of the framework, or where a docstring says so NumPy's
Size = Any  # an int, or where a trace leaves an axis open what stands for its size


class Namespace(ArrayOps, Protocol):
    """Functions on a framework's arrays, which may be traced: those of generation, some of them along any axis, and
    more. JAX's stay in NumPy where all operands are NumPy's."""

    def values(self, x: Array, *, wait: bool = False) -> np.ndarray[Any, Any] | None:
        """The values on the host; None for what is traced, or what only a transfer from another device would bring
        (unless `wait`)."""
        ...

    def size(self, x: Array, axis: int) -> Size:
        """The size of an axis."""
        ...

    def int32(self, x: Any) -> Array:
        """The numbers as int32."""
        ...

    def cast(self, x: Array, dtype: Any) -> Array:
        """The numbers as that type: an array's, or a name."""
        ...

    def full(self, shape: tuple[Size, ...], value: int | bool) -> Array:
        """An int32 or boolean array of that value."""
        ...

    def arange(self, count: Size) -> Array:
        """0 to count - 1 as int32."""
        ...

    def minimum(self, x: Any, y: Any) -> Array:
        """The lower of the two."""
        ...

    def maximum(self, x: Any, y: Any) -> Array:
        """The higher of the two."""
        ...

    def cumsum(self, x_bk: Array, axis: int = -1) -> Array:
        """Running sums along an axis, in the same type."""
        ...

    def sum(self, x_bk: Array, axis: int = -1) -> Array:
        """Sums along an axis, which stays with the size 1; of truth values, how many are true."""
        ...

    def mean(self, x: Array, axis: int) -> Array:
        """Means along an axis, which stays with the size 1."""
        ...

    def shifted(self, x: Array, by: int, axis: int) -> Array:
        """Each entry where the one `by` before it along that axis was; the first ones are 0."""
        ...

    def first_true(self, x: Array) -> Array:
        """The index of the first True along the last axis, as int32 (..., 1); 0 if there is none."""
        ...

    def pad(self, x: Array, before: Size, after: Size) -> Array:
        """(rows, columns) with columns of zeros before and after."""
        ...

    def stacked(self, parts: Sequence[Array]) -> Array:
        """Joined along the first axis."""
        ...

    def gather(self, x: Array, index: Array, axis: int = 1) -> Array:
        """`x[:, index]`, or along another axis."""
        ...

    def cut(self, x: Array, first: Any, count: Size) -> Array:
        """`x[..., first : first + count]`; `first` may be traced."""
        ...

    def columns(self, x: Array, first: Any, count: Size) -> Array:
        """The same along the second axis, compiled once for all `first`."""
        ...


def is_integer(x: Array) -> bool:
    """Whether the numbers are whole; truth values are not."""
    return "int" in x.dtype.name


def is_floating(x: Array) -> bool:
    """Whether the numbers are floating-point."""
    return "float" in x.dtype.name


def known(*sizes: Size) -> bool:
    """Whether all sizes are numbers."""
    return all(isinstance(size, int) for size in sizes)


def fits(shape: Sequence[Size], *expected: Size) -> bool:
    """Whether what is known of a shape agrees with what is known of the expected one."""
    pairs = zip(shape, expected, strict=False)
    return len(shape) == len(expected) and all(not known(a, b) or a == b for a, b in pairs)


def shown(*sizes: Size) -> str:
    """Sizes for a message; ? stands for an open one."""
    return "(" + ", ".join(str(size) if known(size) else "?" for size in sizes) + ")"
