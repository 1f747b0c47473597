"""The key/value cache of TensorFlow (`xla/cache.py`), with or without a `max_length`; a cache without one grows and has
one slot per past token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import tensorflow as tf
from tensorflow.compiler.tf2xla.python.xla import dynamic_update_slice

from monoblock.backends.tf.namespace import XP
from monoblock.backends.tf.ops import Size, Tensor, size
from monoblock.backends.xla.cache import CacheBase, CacheLayerBase, slots
from monoblock.backends.xla.namespace import Namespace
from monoblock.spec import ArchSpec

Legacy = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Cache(CacheBase):
    """See `CacheBase`; without `max_length` the cache grows. `compiled`: only code compiled by XLA uses the cache,
    which then updates it in place."""

    xp: ClassVar[Namespace] = XP
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    length: Tensor
    max_length: int | None = None
    compiled: bool = False

    def layer(self, layer: int) -> CacheLayer:
        """The cache of one layer."""
        grows = self.max_length is None
        return CacheLayer(self.keys[layer], self.values[layer], self.length, grows, self.compiled)

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of `with_tensors`: the state of a loop."""
        return [*self.keys, *self.values, self.length]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Cache:
        """A cache of the same structure with these tensors."""
        layers = len(self.keys)
        return replace(
            self,
            keys=tuple(tensors[:layers]),
            values=tuple(tensors[layers : 2 * layers]),
            length=tensors[2 * layers],
        )

    def to_legacy_cache(self) -> Legacy:
        """A tuple of (keys, values) for each layer."""
        return tuple(zip(self.keys, self.values, strict=True))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer], self.values[layer]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.to_legacy_cache())

    # TensorFlow's extension protocol: a cache can be an argument and a result of a tf.function.

    def __tf_flatten__(self) -> tuple[Any, Any]:
        return (len(self.keys), self.max_length, self.compiled), tuple(self.tensors())

    @classmethod
    def __tf_unflatten__(cls, metadata: Any, components: Any) -> Cache:
        layers, max_length, compiled = metadata
        keys, values = components[:layers], components[layers : 2 * layers]
        return cls(tuple(keys), tuple(values), components[-1], max_length, compiled)


@dataclass(frozen=True)
class CacheLayer(CacheLayerBase):
    """See `CacheLayerBase`."""

    xp: ClassVar[Namespace] = XP
    keys: Tensor
    values: Tensor
    length: Tensor
    grows: bool = False
    compiled: bool = False

    def token_indices(self, length: Tensor) -> Tensor:
        """Those of `CacheLayerBase`; a growing cache stores tokens in order."""
        return tf.range(self.slots) if self.grows else super().token_indices(length)

    def filled(self, keys_bgnd: Tensor, values_bgnd: Tensor) -> CacheLayer:
        """The layer with the first n tokens of a sequence, written into an empty cache."""
        return self.appended(keys_bgnd, values_bgnd)

    def appended(self, keys_bgnd: Tensor, values_bgnd: Tensor) -> CacheLayer:
        """The layer with n more tokens after the first `length`."""
        keys, values = (tf.cast(new, self.keys.dtype) for new in (keys_bgnd, values_bgnd))
        if self.grows:
            keys, values = tf.concat((self.keys, keys), axis=2), tf.concat((self.values, values), axis=2)
            return replace(self, keys=keys, values=values)
        if self.compiled and keys.shape[2] == 1:
            slot = tf.stack((0, 0, self.length % self.slots, 0))
            keys = dynamic_update_slice(self.keys, keys, slot)
            return replace(self, keys=keys, values=dynamic_update_slice(self.values, values, slot))
        count = size(keys, 2)
        index_s = self.token_indices(self.length + count)
        source_s = tf.clip_by_value(index_s - self.length, 0, count - 1)
        new = (index_s >= self.length)[None, None, :, None]
        return replace(
            self,
            keys=tf.where(new, tf.gather(keys, source_s, axis=2), self.keys),
            values=tf.where(new, tf.gather(values, source_s, axis=2), self.values),
        )


def init_cache(
    spec: ArchSpec, batch: Size, max_length: int | None, dtype: Any = "float32", *, compiled: bool = False
) -> Cache:
    """An empty cache for `batch` rows of up to `max_length` tokens (None: it grows); `compiled` if only XLA's programs
    use it. ValueError for a bidirectional model."""
    if max_length is not None and max_length < 1:
        raise ValueError(f"a cache needs room for at least 1 token, got {max_length}")
    att, counts = spec.attention, slots(spec, max_length or 0)
    keys, values = (
        tuple(tf.zeros((batch, att.kv_heads, count, att.head_dim), dtype) for count in counts)
        for _ in range(2)
    )
    length = tf.zeros((), tf.int32)
    return Cache(keys, values, length=length, max_length=max_length, compiled=compiled)


def from_tuples(past: Sequence[Any]) -> Cache:
    """A growing cache from (keys, values) of each layer, (batch, kv_heads, tokens, head_dim)."""
    for layer in past:
        if len(layer) != 2 or len(layer[0].shape) != 4:
            raise ValueError(
                "past_key_values must hold, for each layer, keys and values (batch, kv_heads, tokens, head_dim), "
                f"got {[tuple(x.shape) for x in layer]}"
            )
    keys, values = (tuple(layer[i] for layer in past) for i in (0, 1))
    return Cache(keys, values, length=tf.convert_to_tensor(size(keys[0], 2), tf.int32))
