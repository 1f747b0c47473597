"""Sharding constraints for FSDP: the compiler all-gathers parameters and does not shard hidden states by width."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from monoblock.backends.xla.namespace import is_static
from monoblock.partition import axis_names, shard_count


@dataclass(frozen=True)
class Gathering:
    """The sharding of hidden states by rows, on automatic axes. Without a constraint the compiler shards them along
    their width, as the token embedding, and all-reduces each matrix product."""

    rows: NamedSharding

    def shard_rows(self, x_bsw: Array) -> Array:
        """Hidden states sharded by rows, if the number of rows is static (not in an export) and divisible."""
        count = shard_count(axis_names(self.rows.spec[0]), self.rows.mesh.shape)
        if not is_static(x_bsw.shape[0]) or x_bsw.shape[0] % count:
            return x_bsw
        return jax.lax.with_sharding_constraint(x_bsw, self.rows)

    def embed(self, table: nn.Embed, ids_bs: Array) -> Array:
        """Rows of a table that is all-gathered along its width, so that each device has the vectors of its tokens."""
        whole = NamedSharding(self.rows.mesh, PartitionSpec(PartitionSpec.UNCONSTRAINED, None))
        weights = jax.lax.with_sharding_constraint(table.embedding, whole)
        return jnp.take(weights.astype(table.dtype), ids_bs, axis=0)
