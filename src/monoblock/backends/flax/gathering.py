"""Parameters that an fsdp axis splits: what tells the compiler to gather them, not to split the hidden states."""

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
    """How the rows of hidden states lie, on automatic axes. Without a word the compiler splits hidden states along
    their width, as the tables of tokens lie, and adds up products over it."""

    rows: NamedSharding

    def split(self, x_bsw: Array) -> Array:
        """Hidden states with their rows split, if there are as many; an export may leave open how many there are."""
        count = shard_count(axis_names(self.rows.spec[0]), self.rows.mesh.shape)
        if not is_static(x_bsw.shape[0]) or x_bsw.shape[0] % count:
            return x_bsw
        return jax.lax.with_sharding_constraint(x_bsw, self.rows)

    def looked_up(self, table: nn.Embed, ids_bs: Array) -> Array:
        """Rows of a table that is gathered along its width: each device then has its own tokens' vectors."""
        whole = NamedSharding(self.rows.mesh, PartitionSpec(PartitionSpec.UNCONSTRAINED, None))
        weights = jax.lax.with_sharding_constraint(table.embedding, whole)
        return jnp.take(weights.astype(table.dtype), ids_bs, axis=0)
