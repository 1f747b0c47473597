"""What the compiled loops over tokens are made of on JAX: `lax.while_loop`, and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from monoblock.backends.flax.arrays import Keys
from monoblock.backends.flax.namespace import XP
from monoblock.backends.xla.compiled import Loop
from monoblock.backends.xla.namespace import Namespace
from monoblock.generation.compiled_loop import ProgramInputs, TokenBuffer


class JaxLoop:
    """`Loop` for JAX; each method is the protocol's. The state of a random source is its key."""

    xp: Namespace = XP

    def draws(self, generator: Keys | None, needed: bool) -> Any:
        return generator.key if needed and generator is not None else np.zeros(2, np.uint32)

    def kept(self, generator: Keys, draws: Array) -> None:
        generator.key = draws

    def source(self, draws: Array, fine: Array) -> Keys:
        return Keys(draws, fine)

    def state(self, source: Keys) -> Array:
        return source.key

    def numbers(self, text: TokenBuffer, given: ProgramInputs) -> tuple[TokenBuffer, ProgramInputs]:
        return TokenBuffer(*(jnp.asarray(part) for part in text)), given

    def run(self, goes_on: Callable[[Any], Array], step: Callable[[Any], Any], start: Any) -> Any:
        return lax.while_loop(goes_on, step, start)


LOOP: Loop = JaxLoop()
