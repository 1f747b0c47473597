"""Placement of arrays on a mesh, whose devices may belong to several processes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from monoblock.partition import axis_names, shard_count


def put(x: Any, sharding: NamedSharding) -> Any:
    """Put an array on devices with a sharding; with several processes, all must pass the same array."""
    if isinstance(x, Tracer) or sharding.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, sharding)
    return from_host(np.asarray(x), sharding)


def from_host(x: Any, sharding: NamedSharding) -> jax.Array:
    """Put a host array on devices; only the shards of this process's devices are read."""
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)

    def shard(index: Any) -> Any:
        return np.array(x[index], dtype, order="C")  # a copy, so that the memory that was read can be freed

    return jax.make_array_from_callback(x.shape, sharding, shard, dtype=dtype)


def rows_of(x: Any) -> NamedSharding | None:
    """The sharding of an array by rows; None if its rows are not sharded, or if it is traced."""
    sharding = None if isinstance(x, Tracer) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))


def split_rows(x: Any, rows: NamedSharding) -> Any:
    """Shard a host array by rows, if the number of rows is divisible; others are unchanged."""
    count = shard_count(axis_names(rows.spec[0]), rows.mesh.shape)
    if not isinstance(x, np.ndarray) or not x.ndim or x.shape[0] % count:
        return x
    return put(x, rows)
