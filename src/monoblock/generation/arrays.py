"""The array operations that generation needs, as a protocol, and their NumPy form.

Everything in `monoblock.generation` computes through an `ArrayOps`, so that processors, stopping and the loop are
written once for all frameworks. Operators (`+ * / ** < <= == & | ~`), `.shape` and reading by slices are taken
from the arrays themselves. Shape suffixes: `b` rows, `n` tokens so far, `v` vocabulary, `k` any last axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import numpy as np

Array = Any  # an array of the backend's framework


class ArrayOps(Protocol):
    """What a backend implements. No function changes its arguments; ids are int64, scores float32.

    "Along" functions work on the last axis, and their index has as many axes as the array.
    """

    def array(self, values: Any) -> Array:
        """An array on the model's device, from Python lists, a NumPy array or an array of the framework.

        Whole numbers become int64, floats float32, truth values stay.
        """
        ...

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        """The values on the host; waits for the device."""
        ...

    def to_list(self, x: Array) -> Any:
        """The values as Python numbers in nested lists; waits for the device."""
        ...

    def host(self, x: Array) -> Array:
        """The same array of the framework in host memory, for streamers."""
        ...

    def to_framework(self, x: Array) -> Array:
        """The same as an array of the framework, wherever it lies: what callers' own functions get."""
        ...

    def argmax(self, x_bk: Array) -> Array:
        """The index of the largest value of each row, the first one if several are equal."""
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
        """The natural logarithm of every value; -inf of 0."""
        ...

    def abs(self, x: Array) -> Array:
        """Every value without its sign."""
        ...

    def max(self, x_bk: Array) -> Array:
        """The largest value of each row, as (rows, 1)."""
        ...

    def sum(self, x_bk: Array) -> Array:
        """The sum of each row, as (rows, 1); of truth values, how many are true."""
        ...

    def cumsum(self, x_bk: Array) -> Array:
        """Running sums along the last axis."""
        ...

    def all(self, x: Array) -> Array:
        """Whether all are true along the last axis, which goes away."""
        ...

    def sort(self, x_bk: Array) -> tuple[Array, Array]:
        """Each row in rising order, and the indices that sort it."""
        ...

    def top_k(self, x_bk: Array, k: int) -> tuple[Array, Array]:
        """The k largest values of each row in falling order, and their indices."""
        ...

    def take_along(self, x_bv: Array, index_bk: Array) -> Array:
        """`x[i, index[i, j]]`."""
        ...

    def put_along(self, x_bv: Array, index_bk: Array, values: Array) -> Array:
        """A copy with `x[i, index[i, j]] = values[i, j]`; `values` may be a number."""
        ...

    def add_along(self, x_bv: Array, index_bk: Array, values_bk: Array) -> Array:
        """A copy with `x[i, index[i, j]] += values[i, j]`, repeated indices added up."""
        ...

    def fill_columns(self, x_bv: Array, index_k: Array, value: float) -> Array:
        """A copy with `x[:, index] = value`."""
        ...

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        """Values of x where the condition holds, else of y; either may be a number."""
        ...

    def choose(self, condition: Any, yes: Callable[[], Array], no: Callable[[], Array]) -> Array:
        """`yes()` if the one truth value holds, else `no()`; both have the same shape and kind.

        In a loop that is compiled the condition may be the device's, and both are compiled.
        """
        ...

    def full_like(self, x: Array, value: float) -> Array:
        """An array of the same shape, kind and device, all `value`."""
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
        """The parts joined along axis 1."""
        ...

    def generator(self, seed: int) -> Any:
        """A source of random numbers that starts from that seed, for `sample`."""
        ...

    def sample(self, scores_bv: Array, generator: Any) -> Array:
        """One token id for each row, drawn from softmax(scores); `None` means the framework's global source.

        ValueError when a row has no token that can be drawn.
        """
        ...

    def draw(self, scores_bk: Array, count: int, generator: Any) -> Array:
        """Indices (rows, count) drawn without replacement from softmax(scores), in the order of the draws."""
        ...


class NumpyOps:
    """`ArrayOps` on NumPy arrays: the reference for backends and what the tests run on."""

    def array(self, values: Any) -> Array:
        made = np.asarray(values)
        if made.dtype == np.bool_:
            return made
        return made.astype(np.float32 if made.dtype.kind == "f" else np.int64, copy=False)

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
        with np.errstate(invalid="ignore"):  # a row of -inf only: nan, which sample() reports
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
        # A Python number takes the other side's type, as in the frameworks, instead of making it float64.
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
        # The last edge is 1 but for rounding; scaling by it keeps a draw near 1 inside the table.
        return (edges > uniform * edges[:, -1:]).argmax(axis=-1)

    def draw(self, scores_bk: Array, count: int, generator: Any) -> Array:
        # The largest of score + Gumbel noise is a draw from the softmax, the next largest one from the rest, ...
        scores = np.asarray(scores_bk, dtype=np.float64)
        if not np.isfinite(self.softmax(scores)).all():
            raise ValueError(NOTHING_TO_DRAW)
        return self.top_k(scores + (generator or np.random).gumbel(size=scores.shape), count)[1]


NOTHING_TO_DRAW = (
    "no token can be drawn: a row's scores hold NaN or +inf, or are all -inf; check the model's dtype (float16 "
    "overflows easily) and that the processors leave at least one token"
)
