"""The key/value cache: arrays that are never changed in place, so that a compiled loop can carry them.

A layer's arrays are (batch, kv_heads, slots, head_dim). A layer with a window shorter than the cache is a ring buffer
of its window: the token of index p is in slot p % slots. A framework's cache is a dataclass with these fields.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Self

from monoblock.backends.xla.namespace import Array, Namespace, Size
from monoblock.spec import ArchSpec


class CacheBase:
    """The keys and values of the tokens that a model has seen: `keys[i]` and `values[i]` are layer i's, `length` (an
    int32 scalar) counts the tokens, of which `max_length` fit."""

    xp: ClassVar[Namespace]
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Array
    max_length: Any

    def get_seq_length(self, layer_idx: int = 0) -> Array:
        """How many tokens the layers have seen; the same for all."""
        del layer_idx
        return self.length

    def get_max_cache_shape(self) -> Any:
        """How many tokens fit; None: no limit."""
        return self.max_length

    def reorder(self, index_b: Array) -> Self:
        """Row i is what row `index_b[i]` was; the number of rows may change."""
        changes: dict[str, Any] = {
            name: tuple(self.xp.take_rows(layer, index_b) for layer in getattr(self, name))
            for name in ("keys", "values")
        }
        return replace(self, **changes)  # pyright: ignore[reportArgumentType]


class CacheLayerBase:
    """One layer of a cache; `length` counts the tokens before those that come in."""

    xp: ClassVar[Namespace]
    keys: Array
    values: Array
    length: Array

    @property
    def slots(self) -> Size:
        """How many tokens the layer holds."""
        return self.xp.size(self.keys, 2)

    def token_indices(self, length: Array) -> Array:
        """The index of the token that each slot holds once `length` tokens were seen, (slots,); negative: none yet."""
        return length - 1 - (length - 1 - self.xp.arange(self.slots)) % self.slots


def slots(spec: ArchSpec, max_length: int) -> list[int]:
    """The slots of each layer of a cache; ValueError for a bidirectional model."""
    if not spec.causal:
        raise ValueError("a bidirectional model has no cache: leave out use_cache and past_key_values")
    return [min(max_length, window or max_length) for window in spec.windows]


def shifted(cache: Any, shift: Any, empty: Any) -> Any:
    """A copy of the cache in an empty one, without its first `shift` tokens."""
    xp: Namespace = cache.xp
    changes: dict[str, list[Array]] = {"keys": [], "values": []}
    for number in range(len(cache.keys)):
        held, into = cache.layer(number), empty.layer(number)
        index_s = into.token_indices(cache.length - shift)
        known_s1 = ((index_s >= 0) & (index_s + shift >= cache.length - held.slots))[:, None]
        slot_s = xp.where(known_s1[:, 0], (index_s + shift) % held.slots, 0)
        for name, arrays in changes.items():
            arrays.append(xp.where(known_s1, xp.gather(getattr(held, name), slot_s, 2), getattr(into, name)))
    return replace(empty, **{n: tuple(x) for n, x in changes.items()}, length=cache.length - shift)
