"""Pure functions on TensorFlow tensors: activations, rotary positions, and which key each query sees.

Shape suffixes: b batch, q queries, k keys, h heads, d head width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf

from monoblock import positions
from monoblock.positions import buckets_behind, inverse_frequencies, is_dynamic, steps
from monoblock.spec import Buckets, RopeScaling, Rotary

Tensor = Any  # tf.Tensor, for which TensorFlow ships no types
Size = Any  # an int, or a scalar tensor where a graph leaves an axis open

ACT: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: tf.nn.gelu(x, approximate=False),
    # TensorFlow's own takes eight times as long on CPUs: it has pow(x, 3).
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + tf.tanh(math.sqrt(2 / math.pi) * x * (1.0 + 0.044715 * x * x))),
    "quick_gelu": lambda x: x * tf.sigmoid(1.702 * x),
    "relu": tf.nn.relu,
    "relu2": lambda x: tf.square(tf.nn.relu(x)),
    "silu": tf.nn.silu,
}

# Finite, so that a row that may see nothing becomes a mean and not NaN.
LOWEST = float(np.finfo(np.float32).min)


def size(x: Tensor, axis: int) -> Size:
    """The size of an axis: an int where it is known, else a scalar tensor."""
    known = x.shape[axis]
    return tf.shape(x)[axis] if known is None else known


def dropped(x: Tensor, rate: float, seed: Tensor | None, place: int) -> Tensor:
    """Dropout whose mask depends on the call's seed and the place alone, so that a backward pass that computes a block
    again draws the same one. Without a seed, or at rate 0, nothing drops."""
    if seed is None or not rate:
        return x
    own = tf.random.fold_in(seed, place)
    return tf.nn.experimental.stateless_dropout(x, rate, seed=own)


# ---------------------------------------------------------------------------- positions


def stretched(rotary: Rotary, scaling: RopeScaling, length_b: Tensor) -> Tensor:
    """The factor (b, dim / 2) of dynamic scaling on the frequencies of texts of these lengths."""
    original = scaling.original_length
    ratio = tf.cast(tf.maximum(length_b, original), tf.float64) / original
    growth = tf.math.log(scaling.factor * ratio - (scaling.factor - 1)) * (rotary.dim / (rotary.dim - 2))
    return tf.cast(tf.exp(-growth[:, None] * tf.constant(steps(rotary))), tf.float32)


def rotations(
    positions_bq: Tensor, rotary: Rotary, dtype: Any, length_b: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, each (b, 1, q, dim). Dynamic scaling goes by each row's own length: the given
    one, else the last position's."""
    inverse, factor = inverse_frequencies(rotary)
    inverse_b = tf.constant(inverse)[None]
    if is_dynamic(rotary):
        assert rotary.scaling is not None
        length_b = tf.reduce_max(positions_bq, axis=-1) + 1 if length_b is None else length_b
        inverse_b = inverse_b * stretched(rotary, rotary.scaling, length_b)
    angles = tf.cast(positions_bq[:, None, :, None], tf.float32) * inverse_b[:, None, None]
    angles = tf.concat((angles, angles), axis=-1)
    return tf.cast(tf.cos(angles) * factor, dtype), tf.cast(tf.sin(angles) * factor, dtype)


def rotate(x_bhqd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `dim` channels by half-rotation: (a, b) -> (a cos - b sin, b cos + a sin)."""
    dim = cos.shape[-1]
    turned, kept = x_bhqd[..., :dim], x_bhqd[..., dim:]
    a, b = tf.split(turned, 2, axis=-1)
    turned = turned * cos + tf.concat((-b, a), axis=-1) * sin
    return tf.concat((turned, kept), axis=-1) if kept.shape[-1] else turned


def bucketed(distance: Tensor, count: int, max_distance: int) -> Tensor:
    """T5's bucket of each distance (key - query): half of the buckets look ahead; in each half, half are exact and the
    rest grow with the logarithm up to `max_distance`."""
    far = tf.minimum(tf.abs(distance), max_distance)
    return tf.where(distance > 0, count // 2, 0) + tf.gather(buckets_behind(count, max_distance), far)


@functools.lru_cache(maxsize=8)
def buckets_of(count: int, buckets: Buckets) -> np.ndarray[Any, Any]:
    """The buckets (count, count) of the distances in a text, as a constant: XLA would look them up for each query
    and key of every head in every layer."""
    place = np.arange(count)
    return positions.bucketed(place[None, :] - place[:, None], buckets)


def biases(table: Tensor, buckets_qk: Any) -> Tensor:
    """The biases (1, h, q, k) of buckets, from their table (count, h)."""
    return tf.transpose(tf.gather(tf.cast(table, tf.float32), buckets_qk), (2, 0, 1))[None]


# ---------------------------------------------------------------------------- who sees whom


@dataclass(frozen=True)
class Scope:
    """Which keys each query may see, from indices alone: `valid_k & (k <= q or not causal) & (q - k < window)`.

    `index_q` (q,) and `index_k` (k,) are places in the sequence, negative where nothing is; `valid_bk` is False for
    padding (None: there is none); `segment_bq` and `segment_bk` number the parts of a packed row (None: one part).
    `aligned`: queries and keys are the same tokens. `slopes_h` are ALiBi's; `table` (count, h) is the bias of the
    `buckets` of distances or, without `buckets`, what `bias` has made of it for these queries and keys. `masked_rows`:
    the spec's.
    """

    index_q: Tensor
    index_k: Tensor
    valid_bk: Tensor | None = None
    segment_bq: Tensor | None = None
    segment_bk: Tensor | None = None
    slopes_h: Tensor | None = None
    table: Tensor | None = None
    causal: bool = True
    aligned: bool = True
    window: int | None = None
    buckets: Buckets | None = None
    masked_rows: str = "all"

    def of_keys(self, index_k: Tensor) -> Scope:
        """The same scope over keys at these places of the sequence, of which negative ones hold nothing."""

        def placed(x_bk: Tensor | None) -> Tensor | None:
            return None if x_bk is None else tf.gather(x_bk, tf.maximum(index_k, 0), axis=1)

        return replace(
            self,
            index_k=index_k,
            valid_bk=placed(self.valid_bk),
            segment_bk=placed(self.segment_bk),
            aligned=False,
        )

    def part(self, first_q: Size, queries: Size, first_k: Size, keys: Size) -> Scope:
        """The scope of a range of queries and one of keys."""
        return replace(
            self,
            index_q=cut(self.index_q, first_q, queries, -1),
            index_k=cut(self.index_k, first_k, keys, -1),
            valid_bk=cut(self.valid_bk, first_k, keys, -1),
            segment_bq=cut(self.segment_bq, first_q, queries, -1),
            segment_bk=cut(self.segment_bk, first_k, keys, -1),
        )

    @property
    def all_seen(self) -> bool:
        """Whether it is known that every query sees every key."""
        open_ends = self.aligned and not self.causal and self.window is None
        return open_ends and self.valid_bk is None and self.segment_bk is None

    def visible(self) -> Tensor:
        """(b or 1, 1, q, k), True where the query may see the key."""
        distance = self.index_q[:, None] - self.index_k[None, :]
        seen = tf.broadcast_to(self.index_k >= 0, tf.shape(distance))
        if self.causal:
            seen = seen & (distance >= 0)
        if self.window is not None:
            seen = seen & (distance < self.window)
        seen = seen[None, None]
        if self.valid_bk is not None:
            seen = seen & self.valid_bk[:, None, None, :]
        if self.segment_bq is not None and self.segment_bk is not None:
            seen = seen & (self.segment_bq[:, None, :, None] == self.segment_bk[:, None, None, :])
        return seen

    def bias(self) -> Tensor | None:
        """What is added to the scores, (1, h, q, k) of ALiBi or of the buckets; None if there is nothing."""
        if self.buckets is None and self.table is not None:
            return self.table
        distance = self.index_k[None, :] - self.index_q[:, None]
        if self.table is not None and self.buckets is not None:
            return biases(self.table, bucketed(distance, self.buckets.count, self.buckets.max_distance))
        if self.slopes_h is not None:
            return (self.slopes_h[:, None, None] * tf.cast(distance, tf.float32))[None]
        return None

    def blind(self) -> Tensor | None:
        """(b, 1, q, 1), True for queries that see no key: before a row's first real token, or with nothing but padding
        in their window. None if no padding can make such, or if keys and queries do not line up."""
        if self.valid_bk is None or not self.causal or not self.aligned:
            return None
        count = tf.cumsum(tf.cast(self.valid_bk, tf.int32), axis=-1)
        if self.window is not None:
            before = tf.pad(count, ((0, 0), (self.window, 0)))
            count = count - before[:, : tf.shape(count)[1]]
        return (count == 0)[:, None, :, None]

    def mean(self, v_bgkd: Tensor) -> Tensor:
        """(b, g, 1 or q, d): of the values of the keys on which a query that sees none has equal weights, where keys
        and queries line up. By sums along the keys, without an array of queries x keys."""
        if self.masked_rows == "all" or self.valid_bk is None:
            return tf.reduce_mean(v_bgkd, axis=2, keepdims=True)
        exact = v_bgkd.dtype if v_bgkd.dtype == tf.float64 else tf.float32
        wide, real = tf.cast(v_bgkd, exact), tf.cast(self.valid_bk, exact)
        own = wide * real[:, None, :, None]
        if self.masked_rows == "real":
            count = tf.reduce_sum(real, axis=-1)[:, None, None, None]
            total = tf.reduce_sum(own, axis=2, keepdims=True) / tf.maximum(count, 1)
            return tf.cast(
                tf.where(count > 0, total, tf.reduce_mean(wide, axis=2, keepdims=True)), v_bgkd.dtype
            )
        every, keys = tf.cumsum(wide, axis=2), size(v_bgkd, 2)
        count = tf.range(1, keys + 1)
        if self.window is not None:
            every -= tf.pad(every, ((0, 0), (0, 0), (self.window, 0), (0, 0)))[:, :, :keys]
            count = tf.minimum(count, self.window)
        count = tf.cumsum(real, axis=-1) + tf.cast(count, exact)
        return tf.cast((every + tf.cumsum(own, axis=2)) / count[:, None, :, None], v_bgkd.dtype)

    def equal_weights(self) -> Tensor:
        """The weights that `mean` has, (b or 1, 1, 1 or q, k), in float32."""
        if self.masked_rows == "all" or self.valid_bk is None:
            chosen = tf.ones_like(self.index_k)[None, None, None] > 0
        elif self.masked_rows == "real":
            real = self.valid_bk[:, None, None]
            chosen = real | ~tf.reduce_any(real, axis=-1, keepdims=True)
        else:
            distance = self.index_q[:, None] - self.index_k
            near = self.valid_bk[:, None, None] | (distance < (self.window or distance + 1))
            chosen = (distance >= 0) & near
        chosen = tf.cast(chosen, tf.float32)
        return chosen / tf.reduce_sum(chosen, axis=-1, keepdims=True)


def cut(x: Tensor | None, first: Size, count: Size, axis: int) -> Tensor | None:
    """`count` entries of an axis from `first` on, either of which a graph may leave open."""
    if x is None:
        return None
    axis %= len(x.shape)
    begin = [first if i == axis else 0 for i in range(len(x.shape))]
    return tf.slice(x, begin, [count if i == axis else -1 for i in range(len(x.shape))])


def after(x: Tensor | None, first: Size, count: Size, axis: int) -> Tensor | None:
    """`cut` for a `first` that the call brings: XLA would compile a slice anew for each, and a gathering once."""
    if x is None or isinstance(first, int):
        return cut(x, first, count, axis)
    return tf.gather(x, first + tf.range(count), axis=axis)
