"""Pure functions on JAX arrays: activations, rotary positions, and which key each query sees.

Shape suffixes: b batch, q queries, k keys, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from monoblock.positions import buckets_behind, inverse_frequencies, is_dynamic, steps
from monoblock.spec import Buckets, RopeScaling, Rotary

ACT: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}

# Finite, so that a row that may see nothing becomes a mean and not NaN.
LOWEST = float(np.finfo(np.float32).min)

# ---------------------------------------------------------------------------- positions


def stretched(rotary: Rotary, scaling: RopeScaling, length_b: Array) -> Array:
    """The factor (b, dim / 2) of dynamic scaling on the frequencies of texts of these lengths."""
    original = scaling.original_length
    ratio = jnp.maximum(length_b, original).astype(jnp.float32) / original
    growth = jnp.log(scaling.factor * ratio - (scaling.factor - 1)) * (rotary.dim / (rotary.dim - 2))
    return jnp.exp(-growth[:, None] * jnp.asarray(steps(rotary), jnp.float32))


def rotations(
    positions_bq: Array, rotary: Rotary, dtype: Any, length_b: Array | None = None
) -> tuple[Array, Array]:
    """cos and sin of the rotary angles, each (b, 1, q, dim). Dynamic scaling goes by each row's own length: the given
    one, else the last position's."""
    inverse, factor = inverse_frequencies(rotary)
    inverse_b = jnp.asarray(inverse)[None]
    if is_dynamic(rotary):
        assert rotary.scaling is not None
        length_b = positions_bq.max(-1) + 1 if length_b is None else length_b
        inverse_b = inverse_b * stretched(rotary, rotary.scaling, length_b)
    angles = positions_bq[:, None, :, None].astype(jnp.float32) * inverse_b[:, None, None]
    angles = jnp.concatenate((angles, angles), axis=-1)
    return (jnp.cos(angles) * factor).astype(dtype), (jnp.sin(angles) * factor).astype(dtype)


def rotate(x_bhqd: Array, cos: Array, sin: Array) -> Array:
    """Rotate the first `dim` channels by half-rotation: (a, b) -> (a cos - b sin, b cos + a sin)."""
    dim = cos.shape[-1]
    turned, kept = x_bhqd[..., :dim], x_bhqd[..., dim:]
    a, b = jnp.split(turned, 2, axis=-1)
    turned = turned * cos + jnp.concatenate((-b, a), axis=-1) * sin
    return jnp.concatenate((turned, kept), axis=-1) if kept.shape[-1] else turned


def bucketed(distance: Array, count: int, max_distance: int) -> Array:
    """T5's bucket of each distance (key - query): half of the buckets look ahead; in each half, half are exact and the
    rest grow with the logarithm up to `max_distance`."""
    far = jnp.minimum(jnp.abs(distance), max_distance)
    return jnp.where(distance > 0, count // 2, 0) + jnp.asarray(buckets_behind(count, max_distance))[far]


# ---------------------------------------------------------------------------- who sees whom


@struct.dataclass
class Scope:
    """Which keys each query may see, from indices alone: `valid_k & (k <= q or not causal) & (q - k < window)`.

    `index_q` (q,) and `index_k` (k,) are places in the sequence, negative where nothing is; `valid_bk` is False for
    padding (None: there is none); `segment_bq` and `segment_bk` number the parts of a packed row (None: one part).
    `aligned`: queries and keys are the same tokens. `slopes_h` are ALiBi's; `table` (count, h) is the bias of the
    `buckets` of distances. `masked_rows`: the spec's.
    """

    index_q: Array
    index_k: Array
    valid_bk: Array | None = None
    segment_bq: Array | None = None
    segment_bk: Array | None = None
    slopes_h: Array | None = None
    table: Array | None = None
    causal: bool = struct.field(pytree_node=False, default=True)
    aligned: bool = struct.field(pytree_node=False, default=True)
    window: int | None = struct.field(pytree_node=False, default=None)
    buckets: Buckets | None = struct.field(pytree_node=False, default=None)
    masked_rows: str = struct.field(pytree_node=False, default="all")

    def of_keys(self, index_k: Array) -> Scope:
        """The same scope over keys at these places of the sequence, of which negative ones hold nothing."""

        def placed(x_bk: Array | None) -> Array | None:
            return None if x_bk is None else jnp.take(x_bk, jnp.maximum(index_k, 0), axis=1)

        return replace(
            self,
            index_k=index_k,
            valid_bk=placed(self.valid_bk),
            segment_bk=placed(self.segment_bk),
            aligned=False,
        )

    def part(self, first_q: Any, queries: int, first_k: Any, keys: int) -> Scope:
        """The scope of a range of queries and one of keys; the beginnings may be traced."""

        def cut(x: Array | None, first: Any, count: int) -> Array | None:
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, first, count, axis=x.ndim - 1)

        return replace(
            self,
            index_q=cut(self.index_q, first_q, queries),
            index_k=cut(self.index_k, first_k, keys),
            valid_bk=cut(self.valid_bk, first_k, keys),
            segment_bq=cut(self.segment_bq, first_q, queries),
            segment_bk=cut(self.segment_bk, first_k, keys),
        )

    def visible(self) -> Array:
        """(b or 1, 1, q, k), True where the query may see the key."""
        distance = self.index_q[:, None] - self.index_k[None, :]
        seen = jnp.broadcast_to(self.index_k >= 0, distance.shape)
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

    def bias(self) -> Array | None:
        """What is added to the scores, (1, h, q, k) of ALiBi or of the buckets; None if there is nothing."""
        distance = self.index_k[None, :] - self.index_q[:, None]
        if self.table is not None and self.buckets is not None:
            buckets = bucketed(distance, self.buckets.count, self.buckets.max_distance)
            return jnp.take(self.table.astype(jnp.float32), buckets, axis=0).transpose(2, 0, 1)[None]
        if self.slopes_h is not None:
            return (self.slopes_h[:, None, None] * distance.astype(jnp.float32))[None]
        return None

    def blind(self) -> Array | None:
        """(b, 1, q, 1), True for queries that see no key: before a row's first real token, or with nothing but padding
        in their window. None if no padding can make such, or if keys and queries do not line up."""
        if self.valid_bk is None or not self.causal or not self.aligned:
            return None
        count = jnp.cumsum(self.valid_bk, axis=-1)
        if self.window is not None and self.window < count.shape[1]:
            gone = jnp.pad(count[:, : -self.window], ((0, 0), (self.window, 0)))
            count = count - gone
        return count[:, None, :, None] == 0

    def mean(self, v_bgkd: Array) -> Array:
        """(b, g, 1 or q, d): of the values of the keys on which a query that sees none has equal weights, where keys
        and queries line up. By sums along the keys, without an array of queries x keys."""
        if self.masked_rows == "all" or self.valid_bk is None:
            return v_bgkd.mean(axis=2, keepdims=True)
        wide, real = (
            v_bgkd.astype(jnp.promote_types(v_bgkd.dtype, jnp.float32)),
            self.valid_bk.astype(jnp.int32),
        )
        own = wide * real[:, None, :, None]
        if self.masked_rows == "real":
            count = real.sum(-1)[:, None, None, None]
            total = own.sum(2, keepdims=True) / jnp.maximum(count, 1)
            return jnp.where(count > 0, total, wide.mean(2, keepdims=True)).astype(v_bgkd.dtype)
        every = jnp.cumsum(wide, axis=2)
        count = jnp.arange(1, every.shape[2] + 1)
        if self.window is not None and self.window < every.shape[2]:
            gone = jnp.pad(every[:, :, : -self.window], ((0, 0), (0, 0), (self.window, 0), (0, 0)))
            every, count = every - gone, jnp.minimum(count, self.window)
        count = jnp.cumsum(real, axis=-1) + count
        return ((every + jnp.cumsum(own, axis=2)) / count[:, None, :, None]).astype(v_bgkd.dtype)

    def equal_weights(self) -> Array:
        """The weights that `mean` has, (b or 1, 1, 1 or q, k)."""
        if self.masked_rows == "all" or self.valid_bk is None:
            return jnp.full((1, 1, 1, self.index_k.shape[0]), 1 / self.index_k.shape[0])
        real = self.valid_bk[:, None, None]
        if self.masked_rows == "real":
            chosen = real | ~real.any(-1, keepdims=True)
        else:
            distance = self.index_q[:, None] - self.index_k
            near = True if self.window is None else distance < self.window
            chosen = (distance >= 0) & (near | real)
        return chosen / chosen.sum(-1, keepdims=True)
