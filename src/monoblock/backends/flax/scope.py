"""The attention mask and bias on JAX, as a pytree."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp
from flax import struct
from jax import Array

from monoblock.backends.flax.namespace import XP
from monoblock.backends.flax.ops import relative_position_bucket
from monoblock.backends.xla.namespace import Namespace
from monoblock.backends.xla.scope import ScopeBase
from monoblock.spec import Buckets


@struct.dataclass
class Scope(ScopeBase):
    """See `ScopeBase`. `slopes_h`: ALiBi slopes; `table` (count, h): the biases of the relative position `buckets`."""

    xp: ClassVar[Namespace] = XP
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

    def bias(self) -> Array | None:
        """The bias of the scores, (1, h, q, k), of ALiBi or relative position buckets; None if there is none."""
        distance = self.index_k[None, :] - self.index_q[:, None]
        if self.table is not None and self.buckets is not None:
            buckets = relative_position_bucket(distance, self.buckets.count, self.buckets.max_distance)
            return jnp.take(self.table.astype(jnp.float32), buckets, axis=0).transpose(2, 0, 1)[None]
        if self.slopes_h is not None:
            return (self.slopes_h[:, None, None] * distance.astype(jnp.float32))[None]
        return None
