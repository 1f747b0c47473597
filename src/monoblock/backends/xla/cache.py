"""The key/value cache: immutable arrays, so that a compiled loop can carry them.

A layer's arrays are (batch, kv_heads, slots, head_dim). A layer with a window shorter than the cache is a ring buffer
of its window: the token of index p is in slot p % slots. Each framework's cache is a dataclass with these
fields.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Self

from monoblock.backends.xla.namespace import Array, Namespace, Size
from monoblock.spec import ArchSpec


class CacheBase:
    """Keys and values of past tokens: `keys[i]` and `values[i]` are layer i's, `length` (an int32 scalar) is the number
    of tokens, `max_length` the capacity."""

    xp: ClassVar[Namespace]
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Array
    max_length: Any

    def get_seq_length(self, layer_idx: int = 0) -> Array:
        """The number of past tokens, the same for all layers."""
        del layer_idx
        return self.length

    def get_max_cache_shape(self) -> Any:
        """The capacity in tokens; None: no limit."""
        return self.max_length

    def reorder(self, index_b: Array) -> Self:
        """The cache whose row i is row `index_b[i]` of this one; the number of rows may change."""
        changes: dict[str, Any] = {
            name: tuple(self.xp.take_rows(layer, index_b) for layer in getattr(self, name))
            for name in ("keys", "values")
        }
        return replace(self, **changes)  # pyright: ignore[reportArgumentType]


class CacheLayerBase:
    """One layer of a cache; `length` is the number of past tokens."""

    xp: ClassVar[Namespace]
    keys: Array
    values: Array
    length: Array

    @property
    def slots(self) -> Size:
        """The capacity of the layer in tokens."""
        return self.xp.size(self.keys, 2)

    def token_indices(self, length: Array) -> Array:
        """(slots,): the index in the sequence of the token in each slot after `length` tokens; negative: an empty
        slot."""
        return length - 1 - (length - 1 - self.xp.arange(self.slots)) % self.slots


def slots(spec: ArchSpec, max_length: int) -> list[int]:
    """The number of slots of each layer; ValueError for a bidirectional model."""
    if not spec.causal:
        raise ValueError("a bidirectional model has no cache: leave out use_cache and past_key_values")
    return [min(max_length, window or max_length) for window in spec.windows]


def copy_shifted(cache: Any, shift: Any, empty: Any) -> Any:
    """Copy a cache into an `empty` one (of other sizes), without its first `shift` tokens."""
    xp: Namespace = cache.xp
    changes: dict[str, list[Array]] = {"keys": [], "values": []}
    for i in range(len(cache.keys)):
        source, target = cache.layer(i), empty.layer(i)
        index_s = target.token_indices(cache.length - shift)
        valid_s1 = ((index_s >= 0) & (index_s + shift >= cache.length - source.slots))[:, None]
        slot_s = xp.where(valid_s1[:, 0], (index_s + shift) % source.slots, 0)
        for name, arrays in changes.items():
            arrays.append(
                xp.where(valid_s1, xp.gather(getattr(source, name), slot_s, 2), getattr(target, name))
            )
    return replace(empty, **{n: tuple(x) for n, x in changes.items()}, length=cache.length - shift)
