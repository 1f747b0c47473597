"""The compiled forward passes of generation, and what is done to caches between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from monoblock.backends.flax.cache import Cache, Layer, init_cache
from monoblock.backends.flax.inputs import Wanted
from monoblock.backends.flax.network import Network
from monoblock.spec import ArchSpec

Given = Mapping[str, Any]


class Pass(NamedTuple):
    """What one pass gives: scores in float32, (b, vocab) of the last token or (b, k, vocab), and the rest."""

    scores: Array
    cache: Cache | None
    attentions: tuple[Array, ...] | None
    hidden_states: tuple[Array, ...] | None


def passed(network: Network, params: Any, given: Given, cache: Cache | None, wanted: Wanted) -> Pass:
    """One pass, to be compiled into something."""
    out = network.apply({"params": params}, given, cache, wanted, method="run")
    scores: Any = out["logits"].astype(jnp.float32)  # pyright: ignore
    last = scores[:, -1] if wanted.keep == 1 else scores
    return Pass(last, *(out.get(name) for name in ("past_key_values", "attentions", "hidden_states")))  # pyright: ignore


@partial(jax.jit, static_argnames=("network", "wanted"))
def anew(network: Network, params: Any, given: Given, wanted: Wanted) -> Pass:
    """A pass over whole texts, without a cache."""
    return passed(network, params, given, None, wanted)


@partial(jax.jit, static_argnames=("network", "wanted", "spec", "max_length"))
def first(
    network: Network, params: Any, given: Given, wanted: Wanted, *, spec: ArchSpec, max_length: int
) -> Pass:
    """A pass over the prompts, into a new cache of `max_length` places with the windows of `spec`."""
    rows = given["attention_mask"].shape[0]
    return passed(network, params, given, init_cache(spec, rows, max_length, network.dtype), wanted)


@partial(jax.jit, static_argnames=("network", "wanted"), donate_argnames=("cache",))
def more(network: Network, params: Any, given: Given, cache: Cache, wanted: Wanted) -> Pass:
    """A pass over the next tokens; the cache that came in is gone."""
    return passed(network, params, given, cache, wanted)


@partial(jax.jit, static_argnames=("network",))
def lookup(network: Network, params: Any, input_ids: Any) -> Array:
    """Token ids as vectors."""
    found: Any = network.apply({"params": params}, input_ids, method="lookup")
    return found


@jax.jit
def reordered(cache: Cache, index_b: Any) -> Cache:
    """Row i becomes what row index[i] was."""
    return cache.reorder(index_b)


@partial(jax.jit, static_argnames=("spec", "max_length"))
def moved(cache: Cache, shift: Any, *, spec: ArchSpec, max_length: int) -> Cache:
    """A copy of the cache for `max_length` places and the windows of `spec`, without its first `shift` tokens."""
    empty = init_cache(spec, cache.keys[0].shape[0], max_length, cache.keys[0].dtype)
    layers = [_moved(cache.layer(i), cache.length, shift, empty.layer(i)) for i in range(len(cache.keys))]
    keys, values = tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers)
    return replace(empty, keys=keys, values=values, length=cache.length - shift)


def _moved(layer: Layer, length: Array, shift: Any, into: Layer) -> Layer:
    places = layer.places(length) - shift
    kept = (places >= 0) & (places >= length - shift - into.slots)
    slots = jnp.where(kept, places % into.slots, into.slots)

    def put(held: Array, new: Array) -> Array:
        return new.at[:, :, slots].set(held, mode="drop")

    return replace(into, keys=put(layer.keys, into.keys), values=put(layer.values, into.values))
