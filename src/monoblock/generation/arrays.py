"""`ArrayOps`: the array operations of generation as a protocol, with its NumPy implementation.

All of `monoblock.generation` computes through an `ArrayOps`, so that processors, stopping criteria and the loop are
written once for all frameworks. Operators (`+ * / ** < <= == & | ~`), `.shape` and read-only slicing are those of the
arrays themselves. Shape suffixes: `b` rows, `n` tokens so far, `v` vocabulary, `k` any last axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import numpy as np

Array = Any  # an array of the backend's framework


class ArrayOps(Protocol):
    """Operations that a backend implements. None modifies its arguments; ids are int64, scores float32.

    The `*_along` functions work on the last axis; their index has as many axes as the array.
    """

    def array(self, values: Any) -> Array:
        """An array on the model's device, from Python lists, a NumPy array or an array of the framework.

        Integers become int64, floats float32; booleans stay bool.
        """
        ...

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        """The values as a NumPy array on the host; synchronises with the device."""
        ...

    def to_list(self, x: Array) -> Any:
        """The values as nested lists of Python numbers; synchronises with the device."""
        ...

    def host(self, x: Array) -> Array:
        """The same framework array in host memory, for streamers."""
        ...

    def to_framework(self, x: Array) -> Array:
        """The same values as a framework array on any device, as user-defined functions receive them."""
        ...

    def argmax(self, x_bk: Array) -> Array:
        """The index of the largest value of each row; of equal ones the first."""
        ...

    def softmax(self, x_bk: Array) -> Array:
        """Probabilities of each row."""
        ...

    def log_softmax(self, x_bk: Array) -> Array:
        """Log-probabilities of each row."""
        ...

    def exp(self, x: Array) -> Array:
        """e to the power of every value."""
        ...

    def log(self, x: Array) -> Array:
        """The natural logarithm of every value; -inf for 0."""
        ...

    def abs(self, x: Array) -> Array:
        """The absolute value of every element."""
        ...

    def max(self, x_bk: Array) -> Array:
        """The largest value of each row, as (rows, 1)."""
        ...

    def sum(self, x_bk: Array) -> Array:
        """The sum of each row, as (rows, 1); of booleans, the number of true ones."""
        ...

    def cumsum(self, x_bk: Array) -> Array:
        """Running sums along the last axis."""
        ...

    def all(self, x: Array) -> Array:
        """Whether all values along the last axis are true; the axis is removed."""
        ...

    def sort(self, x_bk: Array) -> tuple[Array, Array]:
        """Each row in ascending order, and the indices that sort it."""
        ...

    def top_k(self, x_bk: Array, k: int) -> tuple[Array, Array]:
        """The k largest values of each row in descending order, and their indices."""
        ...

    def take_along(self, x_bv: Array, index_bk: Array) -> Array:
        """`x[i, index[i, j]]`."""
        ...

    def put_along(self, x_bv: Array, index_bk: Array, values: Array) -> Array:
        """A copy with `x[i, index[i, j]] = values[i, j]`; `values` may be a number."""
        ...

    def add_along(self, x_bv: Array, index_bk: Array, values_bk: Array) -> Array:
        """A copy with `x[i, index[i, j]] += values[i, j]`; repeated indices accumulate."""
        ...

    def fill_columns(self, x_bv: Array, index_k: Array, value: float) -> Array:
        """A copy with `x[:, index] = value`."""
        ...

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        """Values of x where the condition is true, else of y; either may be a number."""
        ...

    def choose(self, condition: Any, yes: Callable[[], Array], no: Callable[[], Array]) -> Array:
        """`yes()` if the scalar condition is true, else `no()`; both return the same shape and dtype.

        In a compiled loop the condition may be a device scalar; both branches are then compiled.
        """
        ...

    def full_like(self, x: Array, value: float) -> Array:
        """An array of the same shape, dtype and device, filled with `value`."""
        ...

    def mask(self, rows: int, columns: int) -> Array:
        """A boolean (rows, columns) array, all false."""
        ...

    def take_rows(self, x: Array, index_b: Array) -> Array:
        """`x[index]` along the first axis: selects, repeats and reorders rows."""
        ...

    def reshape(self, x: Array, shape: tuple[int, ...]) -> Array:
        """The same values in the same order, in another shape."""
        ...

    def concat(self, parts: Sequence[Array]) -> Array:
        """The arrays joined along axis 1."""
        ...

    def generator(self, seed: int) -> Any:
        """A random number generator with that seed, for `sample`."""
        ...

    def sample(self, scores_bv: Array, generator: Any) -> Array:
        """One token id for each row, drawn from softmax(scores); `None` means the framework's global generator.

        ValueError for a row without a token that can be drawn.
        """
        ...

    def draw(self, scores_bk: Array, count: int, generator: Any) -> Array:
        """Indices (rows, count) drawn without replacement from softmax(scores), in draw order."""
        ...


class NumpyOps:
    """`ArrayOps` on NumPy arrays: the reference for backends, and the backend of the unit tests."""

    def array(self, values: Any) -> Array:
        x = np.asarray(values)
        if x.dtype == np.bool_:
            return x
        return x.astype(np.float32 if x.dtype.kind == "f" else np.int64, copy=False)

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        return np.asarray(x)

    def to_list(self, x: Array) -> Any:
        return np.asarray(x).tolist()

    def host(self, x: Array) -> Array:
        return x

    def to_framework(self, x: Array) -> Array:
        return x

    def argmax(self, x_bk: Array) -> Array:
        return np.argmax(x_bk, axis=-1)

    def softmax(self, x_bk: Array) -> Array:
        with np.errstate(invalid="ignore"):  # a row of -inf alone gives NaN, which sample() reports
            weights = np.exp(x_bk - np.max(x_bk, axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    def log_softmax(self, x_bk: Array) -> Array:
        shifted = x_bk - np.max(x_bk, axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

    def exp(self, x: Array) -> Array:
        return np.exp(x)

    def log(self, x: Array) -> Array:
        with np.errstate(divide="ignore"):
            return np.log(x)

    def abs(self, x: Array) -> Array:
        return np.abs(x)

    def max(self, x_bk: Array) -> Array:
        return np.max(x_bk, axis=-1, keepdims=True)

    def sum(self, x_bk: Array) -> Array:
        return np.sum(x_bk, axis=-1, keepdims=True)

    def cumsum(self, x_bk: Array) -> Array:
        return np.cumsum(x_bk, axis=-1)

    def all(self, x: Array) -> Array:
        return np.all(x, axis=-1)

    def sort(self, x_bk: Array) -> tuple[Array, Array]:
        index = np.argsort(x_bk, axis=-1, kind="stable")
        return np.take_along_axis(x_bk, index, axis=-1), index

    def top_k(self, x_bk: Array, k: int) -> tuple[Array, Array]:
        index = np.argsort(-np.asarray(x_bk), axis=-1, kind="stable")[..., :k]
        return np.take_along_axis(x_bk, index, axis=-1), index

    def take_along(self, x_bv: Array, index_bk: Array) -> Array:
        return np.take_along_axis(x_bv, index_bk, axis=-1)

    def put_along(self, x_bv: Array, index_bk: Array, values: Array) -> Array:
        out = np.array(x_bv)
        np.put_along_axis(out, index_bk, values, axis=-1)
        return out

    def add_along(self, x_bv: Array, index_bk: Array, values_bk: Array) -> Array:
        out = np.array(x_bv)
        for row, index, values in zip(out, index_bk, values_bk, strict=True):
            np.add.at(row, index, values)
        return out

    def fill_columns(self, x_bv: Array, index_k: Array, value: float) -> Array:
        out = np.array(x_bv)
        out[:, index_k] = value
        return out

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        # A Python number takes the other operand's dtype, as in the frameworks, and does not promote it to float64.
        kind: Any = next((side.dtype for side in (x, y) if hasattr(side, "dtype")), None)
        return np.asarray(cast(Any, np.where(condition, x, y)), dtype=kind)

    def choose(self, condition: Any, yes: Callable[[], Array], no: Callable[[], Array]) -> Array:
        return yes() if condition else no()

    def full_like(self, x: Array, value: float) -> Array:
        return np.full_like(x, value)

    def mask(self, rows: int, columns: int) -> Array:
        return np.zeros((rows, columns), dtype=np.bool_)

    def take_rows(self, x: Array, index_b: Array) -> Array:
        return np.asarray(x)[index_b]

    def reshape(self, x: Array, shape: tuple[int, ...]) -> Array:
        return np.reshape(x, shape)

    def concat(self, parts: Sequence[Array]) -> Array:
        return np.concatenate(list(parts), axis=1)

    def generator(self, seed: int) -> Any:
        return np.random.default_rng(seed)

    def sample(self, scores_bv: Array, generator: Any) -> Array:
        probabilities = self.softmax(np.asarray(scores_bv, dtype=np.float64))
        if not np.isfinite(probabilities).all():
            raise ValueError(NOTHING_TO_DRAW)
        uniform = (generator or np.random).random((probabilities.shape[0], 1))
        edges = np.cumsum(probabilities, axis=-1)
        # The last edge is 1 up to rounding; the draw is scaled by it, so that one near 1 stays within the table.
        return (edges > uniform * edges[:, -1:]).argmax(axis=-1)

    def draw(self, scores_bk: Array, count: int, generator: Any) -> Array:
        # Gumbel top-k: the largest score + Gumbel noise is a draw from the softmax, the next a draw from the rest, ...
        scores = np.asarray(scores_bk, dtype=np.float64)
        if not np.isfinite(self.softmax(scores)).all():
            raise ValueError(NOTHING_TO_DRAW)
        return self.top_k(scores + (generator or np.random).gumbel(size=scores.shape), count)[1]


NOTHING_TO_DRAW = (
    "no token can be drawn: a row's scores hold NaN or +inf, or are all -inf; check the model's dtype (float16 "
    "overflows easily) and that the processors leave at least one token"
)
