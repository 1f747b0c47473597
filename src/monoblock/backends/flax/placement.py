"""Where arrays lie: put onto a mesh, of whose devices some may be those of other processes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from monoblock.partition import axis_names, shard_count


def placed(x: Any, sharding: NamedSharding) -> Any:
    """An array as it is to lie; where that is on devices of several processes, they all have the same array."""
    if isinstance(x, Tracer) or sharding.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, sharding)
    return from_host(np.asarray(x), sharding)


def from_host(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array on the host, of which nothing is read but what lies on this process's devices."""
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)

    def part(index: Any) -> Any:
        return np.array(x[index], dtype, order="C")  # a copy: the memory of what was read goes back

    return jax.make_array_from_callback(x.shape, sharding, part, dtype=dtype)


def rows_of(x: Any) -> NamedSharding | None:
    """How the rows of an array are split; None where they are not, or where its type does not say so."""
    sharding = None if isinstance(x, Tracer) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))


def split_rows(x: Any, rows: NamedSharding) -> Any:
    """An array of the host with its rows split, where there are as many; others as they are."""
    count = shard_count(axis_names(rows.spec[0]), rows.mesh.shape)
    if not isinstance(x, np.ndarray) or not x.ndim or x.shape[0] % count:
        return x
    return placed(x, rows)
