"""`monoblock.generation`'s array operations on TensorFlow; arrays on the host stay there.

In the host loop, token ids and masks are NumPy arrays; scores are tensors. Each operation depends on its operands:
NumPy's if all are NumPy arrays, else TensorFlow's, eager or in a graph (compiled loops run the same processors).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from monoblock.backends.tf.ops import Tensor, size
from monoblock.generation.arrays import NOTHING_TO_DRAW, NumpyOps
from monoblock.seeds import signed

# The same random numbers on every device, compiled or not; TensorFlow's default depends on the device.
ALGORITHM = "philox"


class Seeds:
    """A random number generator: the seed of each draw is derived from the first seed (two integers) and the number of
    draws. `can_sample`: whether all rows so far had a token to draw; None before the first draw."""

    def __init__(self, seed: Any, count: Any = 0, can_sample: Any = None) -> None:
        self.seed = tf.cast(tf.convert_to_tensor(seed), tf.int32)
        self.count, self.can_sample = count, can_sample

    def next(self) -> Tensor:
        """A seed for one draw."""
        seed = tf.random.fold_in(self.seed, self.count, alg=ALGORITHM)
        self.count = self.count + 1
        return seed


def fresh_seeds() -> Seeds:
    """Seeds from TensorFlow's global generator, which `tf.random.set_seed` seeds."""
    return Seeds(tf.random.uniform((2,), tf.int32.min, tf.int32.max, tf.int32))


def _can_sample(scores_bk: Tensor) -> Tensor:
    """A boolean scalar: whether all rows can be sampled (no NaN or +inf, and not only -inf)."""
    # Compared with itself, as a maximum may ignore NaN.
    return tf.reduce_all(tf.math.is_finite(tf.reduce_max(scores_bk, axis=-1))) & tf.reduce_all(
        scores_bk == scores_bk
    )


def gumbel_noise(seed: Tensor, scores_bk: Tensor) -> Tensor:
    """Scores with Gumbel noise: their top k are k draws from the softmax without replacement."""
    # From random integers, which are the same everywhere; random floats of TensorFlow and XLA differ.
    integers: Any = {"minval": None, "maxval": None, "dtype": tf.uint32}
    bits = tf.random.stateless_uniform(tf.shape(scores_bk), seed, **integers, alg=ALGORITHM)
    high = tf.bitwise.right_shift(
        bits, tf.constant(9, tf.uint32)
    )  # 23 bits, so that adding 0.5 is exact in float32
    uniform = (tf.cast(high, scores_bk.dtype) + 0.5) * 2.0**-23
    return scores_bk - tf.math.log(-tf.math.log(uniform))


def to_tensor(x: Any) -> Any:
    """A NumPy array as a tensor (others unchanged); integers as int32, as from tokenizers."""
    if not isinstance(x, np.ndarray):
        return x
    return tf.convert_to_tensor(x.astype(np.int32) if x.dtype.kind in "iu" else x)


def has_values(x: Any) -> bool:
    """Whether the values can be read: not those of a graph's tensors."""
    return not tf.is_tensor(x) or hasattr(x, "numpy")


def _all_numpy(*values: Any) -> bool:
    """Whether no value is a tensor."""
    return not any(tf.is_tensor(value) for value in values)


class TfOps(NumpyOps):
    """`ArrayOps` for TensorFlow; see the protocol for the methods. Random draws take `Seeds`; None: the global
    generator."""

    def array(self, values: Any) -> Any:
        return super().array(values) if has_values(values) else values

    def to_framework(self, x: Any) -> Any:
        return to_tensor(x)

    def argmax(self, x_bk: Any) -> Any:
        if _all_numpy(x_bk):
            return super().argmax(x_bk)
        return _read(tf.argmax(x_bk, axis=-1, output_type=tf.int32))

    def softmax(self, x_bk: Any) -> Any:
        return super().softmax(x_bk) if _all_numpy(x_bk) else tf.nn.softmax(x_bk, axis=-1)

    def log_softmax(self, x_bk: Any) -> Any:
        return super().log_softmax(x_bk) if _all_numpy(x_bk) else tf.nn.log_softmax(x_bk, axis=-1)

    def exp(self, x: Any) -> Any:
        return super().exp(x) if _all_numpy(x) else tf.exp(x)

    def log(self, x: Any) -> Any:
        return super().log(x) if _all_numpy(x) else tf.math.log(x)

    def abs(self, x: Any) -> Any:
        return super().abs(x) if _all_numpy(x) else tf.abs(x)

    def max(self, x_bk: Any) -> Any:
        return super().max(x_bk) if _all_numpy(x_bk) else tf.reduce_max(x_bk, axis=-1, keepdims=True)

    def sum(self, x_bk: Any) -> Any:
        if _all_numpy(x_bk):
            return super().sum(x_bk)
        x_bk = tf.cast(x_bk, tf.int64) if x_bk.dtype == tf.bool else x_bk
        return tf.reduce_sum(x_bk, axis=-1, keepdims=True)

    def cumsum(self, x_bk: Any) -> Any:
        return super().cumsum(x_bk) if _all_numpy(x_bk) else tf.cumsum(x_bk, axis=-1)

    def all(self, x: Any) -> Any:
        return super().all(x) if _all_numpy(x) else tf.reduce_all(x, axis=-1)

    def sort(self, x_bk: Any) -> tuple[Any, Any]:
        if _all_numpy(x_bk):
            return super().sort(x_bk)
        descending, index = tf.math.top_k(-x_bk, x_bk.shape[-1])
        return -descending, index

    def top_k(self, x_bk: Any, k: int) -> tuple[Any, Any]:
        if _all_numpy(x_bk):
            return super().top_k(x_bk, k)
        return largest(x_bk, k)

    def take_along(self, x_bv: Any, index_bk: Any) -> Any:
        if _all_numpy(x_bv, index_bk):
            return super().take_along(x_bv, index_bk)
        return tf.gather(x_bv, index_bk, batch_dims=len(x_bv.shape) - 1)

    def put_along(self, x_bv: Any, index_bk: Any, values: Any) -> Any:
        if _all_numpy(x_bv, index_bk, values):
            return super().put_along(x_bv, index_bk, values)
        x_bv = tf.convert_to_tensor(x_bv)
        values = tf.broadcast_to(tf.cast(values, x_bv.dtype), tf.shape(index_bk))
        return tf.tensor_scatter_nd_update(x_bv, _row_column_indices(index_bk), values)

    def add_along(self, x_bv: Any, index_bk: Any, values_bk: Any) -> Any:
        if _all_numpy(x_bv, index_bk, values_bk):
            return super().add_along(x_bv, index_bk, values_bk)
        x_bv = tf.convert_to_tensor(x_bv)
        return tf.tensor_scatter_nd_add(x_bv, _row_column_indices(index_bk), tf.cast(values_bk, x_bv.dtype))

    def fill_columns(self, x_bv: Any, index_k: Any, value: float) -> Any:
        if _all_numpy(x_bv, index_k):
            return super().fill_columns(x_bv, index_k, value)
        columns = tf.range(x_bv.shape[-1])[:, None] == tf.cast(index_k, tf.int32)[None]
        return self.where(tf.reduce_any(columns, axis=-1)[None], value, x_bv)

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        if _all_numpy(condition, x, y):
            return super().where(condition, x, y)
        # A Python number takes the dtype of the other operand.
        kind = next(operand.dtype for operand in (x, y) if hasattr(operand, "dtype"))
        return tf.where(condition, tf.cast(x, kind), tf.cast(y, kind))

    def choose(self, condition: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
        return super().choose(condition, yes, no) if has_values(condition) else tf.cond(condition, yes, no)

    def full_like(self, x: Any, value: float) -> Any:
        return super().full_like(x, value) if _all_numpy(x) else tf.fill(tf.shape(x), tf.cast(value, x.dtype))

    def take_rows(self, x: Any, index_b: Any) -> Any:
        return super().take_rows(x, index_b) if _all_numpy(x, index_b) else tf.gather(x, index_b)

    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        return super().reshape(x, shape) if _all_numpy(x) else tf.reshape(x, shape)

    def concat(self, parts: Sequence[Any]) -> Any:
        return super().concat(parts) if _all_numpy(*parts) else tf.concat(list(parts), axis=1)

    def generator(self, seed: int) -> Seeds:
        # The upper and lower 32 bits of the seed.
        return Seeds(np.array([seed >> 32, signed(seed)], np.int64).astype(np.int32))

    def sample(self, scores_bv: Any, generator: Seeds | None) -> Any:
        return self.draw(scores_bv, 1, generator)[:, 0]

    def draw(self, scores_bk: Any, count: int, generator: Seeds | None) -> Any:
        scores_bk, generator = tf.convert_to_tensor(scores_bk), generator or fresh_seeds()
        _, index_bk = largest(gumbel_noise(generator.next(), scores_bk), count)
        can_sample = _can_sample(scores_bk)
        if not has_values(can_sample):  # in a graph, the generator stores whether rows could be sampled
            generator.can_sample = (
                can_sample if generator.can_sample is None else generator.can_sample & can_sample
            )
        elif not can_sample:
            raise ValueError(NOTHING_TO_DRAW)
        return _read(index_bk)


def largest(x_bk: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their indices (ties by ascending index), from the k blocks with the largest maxima.

    Inside loops, XLA sorts whole rows for `top_k`: 6 ms for a vocabulary of 50,000, against 0.2 ms here.
    """
    count = x_bk.shape[-1]
    block = 1 << round(
        math.log2(max(count / k, 1)) / 2
    )  # the number of blocks is about that of candidates in k blocks
    blocks = -(-count // block)
    if block < 4:
        values, index = tf.math.top_k(x_bk, k)
        return values, index
    x_bnm = tf.pad(x_bk, ((0, 0), (0, blocks * block - count)), constant_values=-np.inf)
    x_bnm = tf.reshape(x_bnm, (-1, blocks, block))
    _, block_bc = tf.math.top_k(tf.reduce_max(x_bnm, axis=-1), k)
    block_bc = tf.sort(block_bc)
    values, candidate = tf.math.top_k(
        tf.reshape(tf.gather(x_bnm, block_bc, batch_dims=1), (-1, k * block)), k
    )
    index_bc = tf.reshape(block_bc[:, :, None] * block + tf.range(block), (-1, k * block))
    return values, tf.gather(index_bc, candidate, batch_dims=1)


def _read(index: Tensor) -> Any:
    """Indices as a NumPy array, unless in a graph."""
    return index.numpy().astype(np.int64) if has_values(index) else index


def _row_column_indices(index_bk: Any) -> Tensor:
    """(rows, k, 2): the row and the column of each entry of `index_bk`."""
    index_bk = tf.cast(index_bk, tf.int32)
    rows_bk = tf.broadcast_to(tf.range(size(index_bk, 0))[:, None], tf.shape(index_bk))
    return tf.stack((rows_bk, index_bk), axis=-1)
