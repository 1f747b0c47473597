"""The key/value cache: tensors that are never changed in place, so that a compiled loop can carry them.

Layer tensors are (batch, kv_heads, slots, head_dim). A layer with a window shorter than the cache keeps its window
only: the token at place p lies in slot p % slots. A cache without `max_length` grows: its slots are the tokens seen so
far.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf
from tensorflow.compiler.tf2xla.python.xla import dynamic_update_slice

from monoblock.backends.tf.ops import Size, Tensor, size
from monoblock.spec import ArchSpec

Legacy = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Cache:
    """The keys and values of the tokens that a model has seen: `keys[i]` and `values[i]` are layer i's, `length` (an
    int32 scalar) counts the tokens, of which `max_length` fit (None: the cache grows). `compiled`: only code that XLA
    compiles uses it, and writes a token in place."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    length: Tensor
    max_length: int | None = None
    compiled: bool = False

    def get_seq_length(self, layer_idx: int = 0) -> Tensor:
        """How many tokens the layers have seen; the same for all."""
        del layer_idx
        return self.length

    def get_max_cache_shape(self) -> int | None:
        """How many tokens fit; None: no limit."""
        return self.max_length

    def reorder(self, index_b: Tensor) -> Cache:
        """Row i is what row `index_b[i]` was; the number of rows may change."""
        keys = tuple(tf.gather(layer, index_b, axis=0) for layer in self.keys)
        values = tuple(tf.gather(layer, index_b, axis=0) for layer in self.values)
        return replace(self, keys=keys, values=values)

    def layer(self, layer: int) -> Layer:
        """One layer's part."""
        grows = self.max_length is None
        return Layer(self.keys[layer], self.values[layer], self.length, grows, self.compiled)

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order that `with_tensors` takes: what a loop carries."""
        return [*self.keys, *self.values, self.length]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Cache:
        """The cache of the same shapes with these tensors."""
        layers = len(self.keys)
        return replace(
            self,
            keys=tuple(tensors[:layers]),
            values=tuple(tensors[layers : 2 * layers]),
            length=tensors[2 * layers],
        )

    def to_legacy_cache(self) -> Legacy:
        """For each layer a tuple of keys and values."""
        return tuple(zip(self.keys, self.values, strict=True))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer], self.values[layer]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.to_legacy_cache())

    # TensorFlow's own protocol, by which a cache may go into and out of a tf.function.

    def __tf_flatten__(self) -> tuple[Any, Any]:
        return (len(self.keys), self.max_length, self.compiled), tuple(self.tensors())

    @classmethod
    def __tf_unflatten__(cls, metadata: Any, components: Any) -> Cache:
        layers, max_length, compiled = metadata
        keys, values = components[:layers], components[layers : 2 * layers]
        return cls(tuple(keys), tuple(values), components[-1], max_length, compiled)


@dataclass(frozen=True)
class Layer:
    """One layer of a cache; `length` counts the tokens before those that come in."""

    keys: Tensor
    values: Tensor
    length: Tensor
    grows: bool = False
    compiled: bool = False

    @property
    def slots(self) -> Size:
        """How many tokens the layer holds."""
        return size(self.keys, 2)

    def places(self, length: Tensor) -> Tensor:
        """Which token each slot holds once `length` tokens were seen, (slots,); negative: none yet."""
        slot = tf.range(self.slots)
        return slot if self.grows else length - 1 - (length - 1 - slot) % self.slots

    def filled(self, keys_bgnd: Tensor, values_bgnd: Tensor) -> Layer:
        """The layer with its first n tokens, of a cache that was empty."""
        return self.appended(keys_bgnd, values_bgnd)

    def appended(self, keys_bgnd: Tensor, values_bgnd: Tensor) -> Layer:
        """The layer with n more tokens after `length` ones."""
        keys, values = (tf.cast(new, self.keys.dtype) for new in (keys_bgnd, values_bgnd))
        if self.grows:
            keys, values = tf.concat((self.keys, keys), axis=2), tf.concat((self.values, values), axis=2)
            return replace(self, keys=keys, values=values)
        if self.compiled and keys.shape[2] == 1:
            slot = tf.stack((0, 0, self.length % self.slots, 0))
            keys = dynamic_update_slice(self.keys, keys, slot)
            return replace(self, keys=keys, values=dynamic_update_slice(self.values, values, slot))
        count = size(keys, 2)
        places = self.places(self.length + count)
        taken = tf.clip_by_value(places - self.length, 0, count - 1)
        new = (places >= self.length)[None, None, :, None]
        return replace(
            self,
            keys=tf.where(new, tf.gather(keys, taken, axis=2), self.keys),
            values=tf.where(new, tf.gather(values, taken, axis=2), self.values),
        )


def init_cache(
    spec: ArchSpec, batch: Size, max_length: int | None, dtype: Any = "float32", *, compiled: bool = False
) -> Cache:
    """An empty cache for `batch` rows of up to `max_length` tokens (None: it grows), `compiled` if XLA alone uses it.
    ValueError for a model that looks both ways."""
    if not spec.causal:
        raise ValueError("a model that looks both ways has no cache: leave out use_cache and past_key_values")
    if max_length is not None and max_length < 1:
        raise ValueError(f"a cache needs room for at least 1 token, got {max_length}")
    att, full = spec.attention, max_length or 0
    slots = [min(full, window or full) for window in spec.windows]
    return Cache(
        keys=tuple(tf.zeros((batch, att.kv_heads, n, att.head_dim), dtype) for n in slots),
        values=tuple(tf.zeros((batch, att.kv_heads, n, att.head_dim), dtype) for n in slots),
        length=tf.zeros((), tf.int32),
        max_length=max_length,
        compiled=compiled,
    )


def from_tuples(past: Sequence[Any]) -> Cache:
    """A growing cache that begins with (keys, values) of each layer, (batch, kv_heads, tokens, head_dim)."""
    for layer in past:
        if len(layer) != 2 or len(layer[0].shape) != 4:
            raise ValueError(
                "past_key_values must hold, for each layer, keys and values (batch, kv_heads, tokens, head_dim), "
                f"got {[tuple(x.shape) for x in layer]}"
            )
    keys, values = (tuple(layer[i] for layer in past) for i in (0, 1))
    return Cache(keys, values, length=tf.convert_to_tensor(size(keys[0], 2), tf.int32))
