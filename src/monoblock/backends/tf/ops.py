"""Pure functions on TensorFlow tensors: activations, positions, and slices of dynamic size.

Shape suffixes: b batch, q queries, k keys, h heads, d head width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from monoblock import positions
from monoblock.positions import inverse_frequencies, is_dynamic, past_position_buckets, steps
from monoblock.spec import Buckets, RopeScaling, Rotary

Tensor = Any  # tf.Tensor; TensorFlow ships no types
Size = Any  # an int, or a scalar tensor for a dynamic axis

ACT: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: tf.nn.gelu(x, approximate=False),
    # tf.nn.gelu takes eight times as long on CPUs, as it computes pow(x, 3).
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + tf.tanh(math.sqrt(2 / math.pi) * x * (1.0 + 0.044715 * x * x))),
    "quick_gelu": lambda x: x * tf.sigmoid(1.702 * x),
    "relu": tf.nn.relu,
    "relu2": lambda x: tf.square(tf.nn.relu(x)),
    "silu": tf.nn.silu,
}

# Finite, so that a fully masked row becomes a mean instead of NaN.
LOWEST = float(np.finfo(np.float32).min)


def size(x: Tensor, axis: int) -> Size:
    """The size of an axis: an int if it is static, else a scalar tensor."""
    static = x.shape[axis]
    return tf.shape(x)[axis] if static is None else static


def dropped(x: Tensor, rate: float, seed: Tensor | None, index: int) -> Tensor:
    """Dropout whose mask depends only on the call's seed and the dropout layer's index, so that gradient checkpointing
    recomputes the same mask. Without a seed or at rate 0, the identity."""
    if seed is None or not rate:
        return x
    return tf.nn.experimental.stateless_dropout(x, rate, seed=tf.random.fold_in(seed, index))


# ---------------------------------------------------------------------------- positions


def dynamic_factor(rotary: Rotary, scaling: RopeScaling, length_b: Tensor) -> Tensor:
    """The factor (b, dim / 2) of dynamic scaling on the RoPE frequencies, for sequences of these lengths."""
    original = scaling.original_length
    ratio = tf.cast(tf.maximum(length_b, original), tf.float64) / original
    growth = tf.math.log(scaling.factor * ratio - (scaling.factor - 1)) * (rotary.dim / (rotary.dim - 2))
    return tf.cast(tf.exp(-growth[:, None] * tf.constant(steps(rotary))), tf.float32)


def rotations(
    positions_bq: Tensor, rotary: Rotary, dtype: Any, length_b: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of the RoPE angles, each (b, 1, q, dim). Dynamic scaling depends on each row's length: `length_b`,
    else the highest position + 1."""
    inverse, factor = inverse_frequencies(rotary)
    inverse_b = tf.constant(inverse)[None]
    if is_dynamic(rotary):
        assert rotary.scaling is not None
        length_b = tf.reduce_max(positions_bq, axis=-1) + 1 if length_b is None else length_b
        inverse_b = inverse_b * dynamic_factor(rotary, rotary.scaling, length_b)
    angles = tf.cast(positions_bq[:, None, :, None], tf.float32) * inverse_b[:, None, None]
    angles = tf.concat((angles, angles), axis=-1)
    return tf.cast(tf.cos(angles) * factor, dtype), tf.cast(tf.sin(angles) * factor, dtype)


def rotate(x_bhqd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to the first `dim` channels, whose halves a, b become (a cos - b sin, b cos + a sin)."""
    dim = cos.shape[-1]
    rotated, rest = x_bhqd[..., :dim], x_bhqd[..., dim:]
    a, b = tf.split(rotated, 2, axis=-1)
    rotated = rotated * cos + tf.concat((-b, a), axis=-1) * sin
    return tf.concat((rotated, rest), axis=-1) if rest.shape[-1] else rotated


def relative_position_bucket(distance: Tensor, count: int, max_distance: int) -> Tensor:
    """T5's bucket of each distance (key - query): half of the buckets are for later keys; in each half, half are exact
    and the others grow with the logarithm up to `max_distance`."""
    clipped = tf.minimum(tf.abs(distance), max_distance)
    return tf.where(distance > 0, count // 2, 0) + tf.gather(
        past_position_buckets(count, max_distance), clipped
    )


@functools.lru_cache(maxsize=8)
def buckets_of(count: int, buckets: Buckets) -> np.ndarray[Any, Any]:
    """The buckets (count, count) of the distances in a sequence, as a constant: XLA would gather them for each query
    and key of every head in every layer."""
    index = np.arange(count)
    return positions.relative_position_bucket(index[None, :] - index[:, None], buckets)


def biases(table: Tensor, buckets_qk: Any) -> Tensor:
    """The biases (1, h, q, k) of the buckets, from their embedding `table` (count, h)."""
    return tf.transpose(tf.gather(tf.cast(table, tf.float32), buckets_qk), (2, 0, 1))[None]


# ---------------------------------------------------------------------------- slices of dynamic size


def cut(x: Tensor | None, first: Size, count: Size, axis: int) -> Tensor | None:
    """`count` entries of an axis from `first`; both may be dynamic."""
    if x is None:
        return None
    axis %= len(x.shape)
    begin = [first if i == axis else 0 for i in range(len(x.shape))]
    return tf.slice(x, begin, [count if i == axis else -1 for i in range(len(x.shape))])


def after(x: Tensor | None, first: Size, count: Size, axis: int) -> Tensor | None:
    """`cut` with a dynamic `first`: XLA would compile a slice for each value, but compiles a gather once."""
    if x is None or isinstance(first, int):
        return cut(x, first, count, axis)
    return tf.gather(x, first + tf.range(count), axis=axis)
