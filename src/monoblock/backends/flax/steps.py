"""The compiled forward passes of generation, and what is done to caches between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from monoblock.backends.flax.arrays import on_device
from monoblock.backends.flax.cache import Cache, init_cache
from monoblock.backends.flax.checked import checked
from monoblock.backends.flax.compiled import LOOP
from monoblock.backends.flax.joining import joined
from monoblock.backends.flax.network import Network
from monoblock.backends.flax.placing import split_rows
from monoblock.backends.flax.processes import on_host
from monoblock.backends.xla import cache as caches
from monoblock.backends.xla import compiled, compiled_beams
from monoblock.backends.xla.compiled import Loop, Start
from monoblock.backends.xla.decoder import WHOLE
from monoblock.backends.xla.inputs import Wanted
from monoblock.backends.xla.passes import Given, Pass, of_outputs
from monoblock.generation.compiled_loop import Program
from monoblock.spec import ArchSpec


class Steps:
    """The passes of a network with these parameters: `xla.passes.Passes`, whose methods these are. Networks that are
    equal share what is compiled."""

    loop: Loop = LOOP

    def __init__(self, network: Network, params: Any, rows: NamedSharding | None = None) -> None:
        self.network, self.params, self.spec, self.rows = network, params, network.spec, rows

    def joined(self) -> Steps:
        """The same passes with joint matrices, where there are any to join."""
        return Steps(*joined(self.network, self.params), self.rows)

    def laid(self, given: Given) -> Given:
        """What a pass is given, with its rows split as the prompts' are."""
        if (rows := self.rows) is None:
            return given
        return {name: x if name in WHOLE else split_rows(x, rows) for name, x in given.items()}

    def checked(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return checked(self.spec, self.network.head_spec, dict(arguments), None, False, documents=False).given

    def past(self, given: Any) -> Any:
        return given

    def first(self, given: Given, wanted: Wanted, spec: ArchSpec, max_length: int) -> Pass:
        return first(self.network, self.params, self.laid(given), wanted, spec=spec, max_length=max_length)

    def more(self, given: Given, cache: Cache, wanted: Wanted) -> Pass:
        return more(self.network, self.params, self.laid(given), cache, wanted)

    def anew(self, given: Given, wanted: Wanted) -> Pass:
        return anew(self.network, self.params, self.laid(given), wanted)

    def lookup(self, ids: Any) -> Array:
        return lookup(self.network, self.params, ids)

    def empty(self, rows: int, spec: ArchSpec, max_length: int) -> Cache:
        return init_cache(spec, rows, max_length, self.network.dtype)

    def moved(self, cache: Cache, shift: int, spec: ArchSpec, max_length: int) -> Cache:
        return moved(cache, np.int32(shift), spec=spec, max_length=max_length)

    def reordered(self, cache: Cache, index_b: Any) -> Cache:
        return reordered(cache, index_b)

    def cut(self, arrays: Sequence[Array], where: tuple[Any, ...]) -> tuple[Array, ...]:
        # On the host, where new lengths compile nothing.
        return tuple(on_device(on_host(array)[where]) for array in arrays)

    def looped(self, program: Program, start: Start) -> Any:
        cache, start = start.cache, start._replace(cache=None, constant=self.laid(start.constant))
        return looped(self.network, program, self.params, cache, start)


def loop_over_tokens(network: Network, program: Program, params: Any, cache: Cache, start: Start) -> Any:
    """A whole loop over tokens, to be compiled."""
    run = compiled.looped if program.search is None else compiled_beams.looped
    return run(LOOP, partial(passed, network, params), program, start._replace(cache=cache))


# The cache that comes in is gone afterwards.
looped = jax.jit(loop_over_tokens, static_argnames=("network", "program"), donate_argnames=("cache",))


def passed(network: Network, params: Any, given: Given, cache: Cache | None, wanted: Wanted) -> Pass:
    """One pass, to be compiled into something."""
    out: Any = network.apply({"params": params}, given, cache, wanted, method="run")
    return of_outputs(out, out["logits"].astype(jnp.float32), wanted)


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
    """A copy of the cache for `max_length` slots and the windows of `spec`, without its first `shift` tokens."""
    empty = init_cache(spec, cache.keys[0].shape[0], max_length, cache.keys[0].dtype)
    return caches.moved(cache, shift, empty)
