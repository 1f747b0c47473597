"""transformers' cache objects as `past_key_values`: converted to a cache of monoblock, and updated as transformers'
models do.

They are recognised by class name, so that transformers is not imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monoblock.backends.pytorch.cache import DynamicCache

LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")


def is_foreign(past: Any) -> bool:
    """Whether this is a cache object of transformers."""
    kinds = type(past).__mro__
    return any(kind.__name__ == "Cache" and kind.__module__.startswith("transformers.") for kind in kinds)


def from_foreign(past: Any, windows: Sequence[int | None]) -> DynamicCache:
    """A cache with the contents of transformers' DynamicCache; ValueError for its other caches.

    `windows`: the attention window of each layer (None: all keys).
    """
    layers: list[Any] | None = getattr(past, "layers", None)
    if layers is None or any(type(layer).__name__ not in LAYERS for layer in layers):
        raise ValueError(
            f"past_key_values is transformers' {type(past).__name__}: only its DynamicCache of version 5 is supported, "
            "neither static nor quantised; give a cache of monoblock"
        )
    if len(layers) not in (0, len(windows)):
        raise ValueError(f"past_key_values has {len(layers)} layers, but the model has {len(windows)}")
    cache = DynamicCache()
    for i, (layer, window) in enumerate(zip(layers, windows, strict=False)):
        length = layer.get_seq_length()
        if length == 0:
            continue
        held = layer.keys.shape[2]
        if held < length and (window is None or held < window - 1):
            raise ValueError(
                f"past_key_values has kept {held} of {length} tokens in layer {i}, where a token of this model "
                f"attends to {'all' if window is None else window}: make the cache with this model's config"
            )
        if len(cache) < i:
            raise ValueError(f"past_key_values has tokens in layer {i}, but none in layer {len(cache)}")
        cache.update(layer.keys, layer.values, i)
        cache.lengths[i], cache.dropped[i] = length, length - held
    return cache


def fill_foreign(past: Any, cache: DynamicCache) -> None:
    """Update transformers' DynamicCache from the cache that `from_foreign` created from it."""
    for i, (keys, values) in enumerate(cache):
        if i >= len(past.layers) or not past.layers[i].is_initialized:
            past.update(keys, values, i)
            continue
        layer = past.layers[i]
        if layer.is_sliding:
            keys, values = (tensor[:, :, 1 - layer.sliding_window :] for tensor in (keys, values))
            layer.cumulative_length = cache.get_seq_length(i)
        layer.keys, layer.values = keys, values
