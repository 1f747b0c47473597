"""The operations of compiled generation loops on JAX: `lax.while_loop`, and PRNG keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from monoblock.backends.flax.arrays import PRNGKeys
from monoblock.backends.flax.namespace import XP
from monoblock.backends.xla.compiled import LoopOps
from monoblock.backends.xla.namespace import Namespace
from monoblock.generation.compiled_loop import ProgramInputs, TokenBuffer


class JaxLoopOps:
    """`LoopOps` for JAX; see the protocol for the methods. The state of a random number generator is its PRNG key."""

    xp: Namespace = XP

    def rng_state(self, generator: PRNGKeys | None, needed: bool) -> Any:
        return generator.key if needed and generator is not None else np.zeros(2, np.uint32)

    def set_rng_state(self, generator: PRNGKeys, rng_state: Array) -> None:
        generator.key = rng_state

    def rng(self, rng_state: Array, can_sample: Array) -> PRNGKeys:
        return PRNGKeys(rng_state, can_sample)

    def state_of(self, rng: PRNGKeys) -> Array:
        return rng.key

    def cast_inputs(self, buffer: TokenBuffer, inputs: ProgramInputs) -> tuple[TokenBuffer, ProgramInputs]:
        return TokenBuffer(*(jnp.asarray(array) for array in buffer)), inputs

    def while_loop(self, condition: Callable[[Any], Array], body: Callable[[Any], Any], start: Any) -> Any:
        return lax.while_loop(condition, body, start)


LOOP_OPS: LoopOps = JaxLoopOps()
