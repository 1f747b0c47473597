"""The key/value cache of JAX (`xla/cache.py`): a pytree, which `jit` accepts."""

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
    """See `CacheBase`; `max_length` is always set."""

    xp: ClassVar[Namespace] = XP
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Array
    max_length: int = struct.field(pytree_node=False)

    def layer(self, layer: int) -> CacheLayer:
        """The cache of one layer."""
        return CacheLayer(keys=self.keys[layer], values=self.values[layer], length=self.length)


@struct.dataclass
class CacheLayer(CacheLayerBase):
    """See `CacheLayerBase`."""

    xp: ClassVar[Namespace] = XP
    keys: Array
    values: Array
    length: Array

    def filled(self, keys_bgnd: Array, values_bgnd: Array) -> CacheLayer:
        """The layer with the first n tokens of a sequence, written into an empty cache."""
        n, slots = keys_bgnd.shape[2], self.slots

        def put(cached: Array, new: Array) -> Array:
            new = new.astype(cached.dtype)
            if n > slots:
                return jnp.roll(new[:, :, -slots:], n % slots, axis=2)
            return lax.dynamic_update_slice_in_dim(cached, new, 0, axis=2)

        return replace(self, keys=put(self.keys, keys_bgnd), values=put(self.values, values_bgnd))

    def appended(self, keys_bgnd: Array, values_bgnd: Array, read_bhnd: Array | None = None) -> CacheLayer:
        """The layer with n more tokens after the first `length`. `read_bhnd`: the attention output computed from the
        unchanged layer; XLA updates the layer in place only if the write depends on that read, else it copies it."""
        n, slots = keys_bgnd.shape[2], self.slots
        if read_bhnd is not None:
            # Always false, which XLA cannot know: the written values depend on the read.
            late = read_bhnd.reshape(*keys_bgnd.shape[:2], -1, keys_bgnd.shape[3])[:, :, :n] > jnp.inf
            keys_bgnd, values_bgnd = (jnp.where(late, 0, new) for new in (keys_bgnd, values_bgnd))
        count = min(n, slots)
        slot = (self.length + jnp.arange(n - count, n)) % slots

        def put(cached: Array, new: Array) -> Array:
            new = new.astype(cached.dtype)
            if n == 1:
                return lax.dynamic_update_slice_in_dim(cached, new, slot[0], axis=2)
            return cached.at[:, :, slot].set(new[:, :, n - count :])

        return replace(self, keys=put(self.keys, keys_bgnd), values=put(self.values, values_bgnd))


def init_cache(spec: ArchSpec, batch: int, max_length: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache for `batch` rows of up to `max_length` tokens. ValueError for a bidirectional model."""
    if batch < 1 or max_length < 1:
        raise ValueError(f"a cache needs at least 1 row and 1 token, got {batch} and {max_length}")
    att = spec.attention
    shapes = [(batch, att.kv_heads, count, att.head_dim) for count in slots(spec, max_length)]
    with jax.ensure_compile_time_eval():  # a constant inside a trace: the cache is known to be empty
        length = jnp.zeros((), jnp.int32)
    keys, values = (tuple(jnp.zeros(shape, dtype) for shape in shapes) for _ in range(2))
    return Cache(keys=keys, values=values, length=length, max_length=max_length)
