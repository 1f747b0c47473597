"""JAX's key/value cache: `xla/cache.py`, a pytree that `jit` can carry."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from monoblock.backends.flax.namespace import XP
from monoblock.backends.xla.cache import CacheBase, CacheLayerBase, slots
from monoblock.backends.xla.namespace import Namespace
from monoblock.spec import ArchSpec


@struct.dataclass
class Cache(CacheBase):
    """See `CacheBase`; `max_length` is always known."""

    xp: ClassVar[Namespace] = XP
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Array
    max_length: int = struct.field(pytree_node=False)

    def layer(self, layer: int) -> CacheLayer:
        """One layer's part."""
        return CacheLayer(keys=self.keys[layer], values=self.values[layer], length=self.length)


@struct.dataclass
class CacheLayer(CacheLayerBase):
    """See `CacheLayerBase`."""

    xp: ClassVar[Namespace] = XP
    keys: Array
    values: Array
    length: Array

    def filled(self, keys_bgnd: Array, values_bgnd: Array) -> CacheLayer:
        """The layer with its first n tokens, of a cache that was empty."""
        n, slots = keys_bgnd.shape[2], self.slots

        def put(held: Array, new: Array) -> Array:
            new = new.astype(held.dtype)
            if n > slots:
                return jnp.roll(new[:, :, -slots:], n % slots, axis=2)
            return lax.dynamic_update_slice_in_dim(held, new, 0, axis=2)

        return replace(self, keys=put(self.keys, keys_bgnd), values=put(self.values, values_bgnd))

    def appended(self, keys_bgnd: Array, values_bgnd: Array, read_bhnd: Array | None = None) -> CacheLayer:
        """The layer with n more tokens after `length` ones. `read_bhnd` is what was computed from the layer as it was:
        a loop can write where it lies only after that, and XLA must be told, or it copies the whole layer."""
        n, slots = keys_bgnd.shape[2], self.slots
        if read_bhnd is not None:
            # Never true, which XLA does not know: what is written now depends on what was read.
            late = read_bhnd.reshape(*keys_bgnd.shape[:2], -1, keys_bgnd.shape[3])[:, :, :n] > jnp.inf
            keys_bgnd, values_bgnd = (jnp.where(late, 0, new) for new in (keys_bgnd, values_bgnd))
        kept = min(n, slots)
        slot = (self.length + jnp.arange(n - kept, n)) % slots

        def put(held: Array, new: Array) -> Array:
            new = new.astype(held.dtype)
            if n == 1:
                return lax.dynamic_update_slice_in_dim(held, new, slot[0], axis=2)
            return held.at[:, :, slot].set(new[:, :, n - kept :])

        return replace(self, keys=put(self.keys, keys_bgnd), values=put(self.values, values_bgnd))


def init_cache(spec: ArchSpec, batch: int, max_length: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache for `batch` rows of up to `max_length` tokens. ValueError for a bidirectional model."""
    if batch < 1 or max_length < 1:
        raise ValueError(f"a cache needs at least 1 row and 1 token, got {batch} and {max_length}")
    att = spec.attention
    shapes = [(batch, att.kv_heads, count, att.head_dim) for count in slots(spec, max_length)]
    with jax.ensure_compile_time_eval():  # a cache made inside a trace is known to be empty
        length = jnp.zeros((), jnp.int32)
    keys, values = (tuple(jnp.zeros(shape, dtype) for shape in shapes) for _ in range(2))
    return Cache(keys=keys, values=values, length=length, max_length=max_length)
