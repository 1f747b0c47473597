"""The compiled forward passes of generation, and operations on caches between them."""

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
from monoblock.backends.flax.checked import check_inputs
from monoblock.backends.flax.compiled import LOOP_OPS
from monoblock.backends.flax.fusing import fuse_projections
from monoblock.backends.flax.network import Network
from monoblock.backends.flax.placement import split_rows
from monoblock.backends.flax.processes import on_host
from monoblock.backends.xla import cache as caches
from monoblock.backends.xla import compiled, compiled_beams
from monoblock.backends.xla.compiled import LoopOps, LoopStart
from monoblock.backends.xla.decoder import NO_TOKEN_AXIS
from monoblock.backends.xla.inputs import ForwardOptions
from monoblock.backends.xla.passes import Given, PassOutput, pass_output
from monoblock.generation.compiled_loop import Program
from monoblock.spec import ArchSpec


class FlaxPasses:
    """`xla.passes.Passes` for a network and its parameters; see the protocol for the methods. Equal networks share
    compiled programs. `rows`: the sharding of the prompts by rows."""

    loop_ops: LoopOps = LOOP_OPS

    def __init__(self, network: Network, params: Any, rows: NamedSharding | None = None) -> None:
        self.network, self.params, self.spec, self.rows = network, params, network.spec, rows

    def fused(self) -> FlaxPasses:
        """The same passes with fused projections, if there are any to fuse."""
        return FlaxPasses(*fuse_projections(self.network, self.params), self.rows)

    def shard_rows(self, given: Given) -> Given:
        """The inputs of a pass, sharded by rows as the prompts are."""
        if (rows := self.rows) is None:
            return given
        return {name: x if name in NO_TOKEN_AXIS else split_rows(x, rows) for name, x in given.items()}

    def check_inputs(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return check_inputs(
            self.spec, self.network.head_spec, dict(arguments), None, False, documents=False
        ).given

    def as_cache(self, given: Any) -> Any:
        return given

    def prefill(self, given: Given, options: ForwardOptions, spec: ArchSpec, max_length: int) -> PassOutput:
        return prefill(
            self.network, self.params, self.shard_rows(given), options, spec=spec, max_length=max_length
        )

    def extend(self, given: Given, cache: Cache, options: ForwardOptions) -> PassOutput:
        return extend(self.network, self.params, self.shard_rows(given), cache, options)

    def uncached(self, given: Given, options: ForwardOptions) -> PassOutput:
        return uncached(self.network, self.params, self.shard_rows(given), options)

    def embed_tokens(self, ids: Any) -> Array:
        return embed_tokens(self.network, self.params, ids)

    def empty_cache(self, rows: int, spec: ArchSpec, max_length: int) -> Cache:
        return init_cache(spec, rows, max_length, self.network.dtype)

    def shifted_cache(self, cache: Cache, shift: int, spec: ArchSpec, max_length: int) -> Cache:
        return shifted_cache(cache, np.int32(shift), spec=spec, max_length=max_length)

    def reordered_cache(self, cache: Cache, index_b: Any) -> Cache:
        return reordered_cache(cache, index_b)

    def sliced(self, arrays: Sequence[Array], index: tuple[Any, ...]) -> tuple[Array, ...]:
        # On the host, where new shapes compile nothing.
        return tuple(on_device(on_host(array)[index]) for array in arrays)

    def run_loop(self, program: Program, start: LoopStart) -> Any:
        cache, start = (
            start.cache,
            start._replace(cache=None, fixed_inputs=self.shard_rows(start.fixed_inputs)),
        )
        return run_loop(self.network, program, self.params, cache, start)


def compiled_loop(network: Network, program: Program, params: Any, cache: Cache, start: LoopStart) -> Any:
    """A whole loop over tokens, to be compiled."""
    run = compiled.token_loop if program.search is None else compiled_beams.beam_loop
    return run(LOOP_OPS, partial(forward_pass, network, params), program, start._replace(cache=cache))


# The input cache is donated.
run_loop = jax.jit(compiled_loop, static_argnames=("network", "program"), donate_argnames=("cache",))


def forward_pass(
    network: Network, params: Any, given: Given, cache: Cache | None, options: ForwardOptions
) -> PassOutput:
    """One forward pass, to be compiled into a program."""
    out: Any = network.apply({"params": params}, given, cache, options, method="run")
    return pass_output(out, out["logits"].astype(jnp.float32), options)


@partial(jax.jit, static_argnames=("network", "options"))
def uncached(network: Network, params: Any, given: Given, options: ForwardOptions) -> PassOutput:
    """A pass over whole sequences, without a cache."""
    return forward_pass(network, params, given, None, options)


@partial(jax.jit, static_argnames=("network", "options", "spec", "max_length"))
def prefill(
    network: Network, params: Any, given: Given, options: ForwardOptions, *, spec: ArchSpec, max_length: int
) -> PassOutput:
    """A pass over the prompts that fills a new cache of `max_length` slots with the windows of `spec`."""
    rows = given["attention_mask"].shape[0]
    return forward_pass(network, params, given, init_cache(spec, rows, max_length, network.dtype), options)


@partial(jax.jit, static_argnames=("network", "options"), donate_argnames=("cache",))
def extend(network: Network, params: Any, given: Given, cache: Cache, options: ForwardOptions) -> PassOutput:
    """A pass over the next tokens; the input cache is donated."""
    return forward_pass(network, params, given, cache, options)


@partial(jax.jit, static_argnames=("network",))
def embed_tokens(network: Network, params: Any, input_ids: Any) -> Array:
    """The embeddings of token ids."""
    found: Any = network.apply({"params": params}, input_ids, method="embed_tokens")
    return found


@jax.jit
def reordered_cache(cache: Cache, index_b: Any) -> Cache:
    """The cache whose row i is row `index_b[i]`."""
    return cache.reorder(index_b)


@partial(jax.jit, static_argnames=("spec", "max_length"))
def shifted_cache(cache: Cache, shift: Any, *, spec: ArchSpec, max_length: int) -> Cache:
    """A copy of the cache for `max_length` slots and the windows of `spec`, without its first `shift` tokens."""
    empty = init_cache(spec, cache.keys[0].shape[0], max_length, cache.keys[0].dtype)
    return caches.copy_shifted(cache, shift, empty)
