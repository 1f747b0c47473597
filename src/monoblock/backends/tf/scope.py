"""The attention mask and bias on TensorFlow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import tensorflow as tf

from monoblock.backends.tf.namespace import XP
from monoblock.backends.tf.ops import Tensor, biases, relative_position_bucket
from monoblock.backends.xla.namespace import Namespace
from monoblock.backends.xla.scope import ScopeBase
from monoblock.spec import Buckets


@dataclass(frozen=True)
class Scope(ScopeBase):
    """See `ScopeBase`. `slopes_h`: ALiBi slopes; `table` (count, h): the biases of the relative position `buckets` or,
    without `buckets`, the precomputed output of `bias`."""

    xp: ClassVar[Namespace] = XP
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

    def bias(self) -> Tensor | None:
        """The bias of the scores, (1, h, q, k), of ALiBi or relative position buckets; None if there is none."""
        if self.buckets is None and self.table is not None:
            return self.table
        distance = self.index_k[None, :] - self.index_q[:, None]
        if self.table is not None and self.buckets is not None:
            return biases(
                self.table, relative_position_bucket(distance, self.buckets.count, self.buckets.max_distance)
            )
        if self.slopes_h is not None:
            return (self.slopes_h[:, None, None] * tf.cast(distance, tf.float32))[None]
        return None
