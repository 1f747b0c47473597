"""What the compiled loops over tokens are made of on JAX: `lax.while_loop`, and keys."""

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
    """`LoopOps` for JAX; each method is the protocol's. The state of a random source is its key."""

    xp: Namespace = XP

    def draws(self, generator: PRNGKeys | None, needed: bool) -> Any:
        return generator.key if needed and generator is not None else np.zeros(2, np.uint32)

    def kept(self, generator: PRNGKeys, draws: Array) -> None:
        generator.key = draws

    def source(self, draws: Array, fine: Array) -> PRNGKeys:
        return PRNGKeys(draws, fine)

    def state(self, source: PRNGKeys) -> Array:
        return source.key

    def numbers(self, text: TokenBuffer, given: ProgramInputs) -> tuple[TokenBuffer, ProgramInputs]:
        return TokenBuffer(*(jnp.asarray(part) for part in text)), given

    def run(self, goes_on: Callable[[Any], Array], step: Callable[[Any], Any], start: Any) -> Any:
        return lax.while_loop(goes_on, step, start)


LOOP_OPS: LoopOps = JaxLoopOps()
