"""The key/value cache: allocated once, never changed in place, a pytree that `jit` can carry.

Layer arrays are (batch, kv_heads, slots, head_dim). A layer with a window shorter than the cache keeps its window only:
the token at place p lies in slot p % slots.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from monoblock.spec import ArchSpec


@struct.dataclass
class Cache:
    """The keys and values of the tokens that a model has seen: `keys[i]` and `values[i]` are layer i's, `length` (an
    int32 scalar) counts the tokens, of which `max_length` fit."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Array
    max_length: int = struct.field(pytree_node=False)

    def get_seq_length(self, layer_idx: int = 0) -> Array:
        """How many tokens the layers have seen; the same for all."""
        del layer_idx
        return self.length

    def get_max_cache_shape(self) -> int:
        """How many tokens fit."""
        return self.max_length

    def reorder(self, index_b: Array) -> Cache:
        """Row i is what row `index_b[i]` was; the number of rows may change."""
        keys = tuple(jnp.take(layer, index_b, axis=0) for layer in self.keys)
        values = tuple(jnp.take(layer, index_b, axis=0) for layer in self.values)
        return replace(self, keys=keys, values=values)

    def layer(self, layer: int) -> Layer:
        """One layer's part."""
        return Layer(keys=self.keys[layer], values=self.values[layer], length=self.length)


@struct.dataclass
class Layer:
    """One layer of a cache; `length` counts the tokens before those that come in."""

    keys: Array
    values: Array
    length: Array

    @property
    def slots(self) -> int:
        """How many tokens the layer holds."""
        return self.keys.shape[2]

    def places(self, length: Array) -> Array:
        """Which token each slot holds once `length` tokens were seen, (slots,); negative: none yet."""
        slot = jnp.arange(self.slots)
        return length - 1 - (length - 1 - slot) % self.slots

    def filled(self, keys_bgnd: Array, values_bgnd: Array) -> Layer:
        """The layer with its first n tokens, of a cache that was empty."""
        n, slots = keys_bgnd.shape[2], self.slots

        def put(held: Array, new: Array) -> Array:
            new = new.astype(held.dtype)
            if n > slots:
                return jnp.roll(new[:, :, -slots:], n % slots, axis=2)
            return lax.dynamic_update_slice_in_dim(held, new, 0, axis=2)

        return replace(self, keys=put(self.keys, keys_bgnd), values=put(self.values, values_bgnd))

    def appended(self, keys_bgnd: Array, values_bgnd: Array, read_bhnd: Array | None = None) -> Layer:
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
    """An empty cache for `batch` rows of up to `max_length` tokens. ValueError for a model that looks both ways."""
    if not spec.causal:
        raise ValueError("a model that looks both ways has no cache")
    if batch < 1 or max_length < 1:
        raise ValueError(f"a cache needs at least 1 row and 1 token, got {batch} and {max_length}")
    att = spec.attention
    shapes = [
        (batch, att.kv_heads, min(max_length, window or max_length), att.head_dim) for window in spec.windows
    ]
    with jax.ensure_compile_time_eval():  # a cache made inside a trace is known to be empty
        length = jnp.zeros((), jnp.int32)
    return Cache(
        keys=tuple(jnp.zeros(shape, dtype) for shape in shapes),
        values=tuple(jnp.zeros(shape, dtype) for shape in shapes),
        length=length,
        max_length=max_length,
    )
