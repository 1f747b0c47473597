"""What the loops over tokens are made of on TensorFlow: `tf.while_loop`, and seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from monoblock.backends.tf.arrays import Seeds, fresh_seeds
from monoblock.backends.tf.namespace import XP
from monoblock.backends.tf.ops import Tensor
from monoblock.backends.xla.compiled import LoopOps
from monoblock.backends.xla.namespace import Namespace
from monoblock.generation.compiled_loop import ProgramInputs, TokenBuffer


class TfLoopOps:
    """`LoopOps` for TensorFlow; each method is the protocol's. The state of a random source is its seed and
    the number of draws made."""

    xp: Namespace = XP

    def draws(self, generator: Seeds | None, needed: bool) -> tuple[Tensor, Tensor]:
        seeds = generator or (fresh_seeds() if needed else Seeds((0, 0)))
        return seeds.seed, tf.constant(seeds.count, tf.int32)

    def kept(self, generator: Seeds, draws: tuple[Tensor, Tensor]) -> None:
        generator.count = int(draws[1])

    def source(self, draws: tuple[Tensor, Tensor], fine: Tensor) -> Seeds:
        return Seeds(*draws, fine)

    def state(self, source: Seeds) -> tuple[Tensor, Tensor]:
        return source.seed, source.count

    def numbers(self, text: TokenBuffer, given: ProgramInputs) -> tuple[TokenBuffer, ProgramInputs]:
        # As float32, in which they are exact: TensorFlow computes with one kind of number at a time, and a processor
        # may raise a number to a length's power.
        def wide(x: Any) -> Tensor:
            return tf.cast(x, tf.float32)

        def measured(text: TokenBuffer) -> TokenBuffer:
            return text._replace(length=wide(text.length))

        numbers = {name: wide(value) for name, value in given.numbers.items()}
        return measured(text), ProgramInputs(numbers, measured(given.prompt), wide(given.max_length))

    def run(self, goes_on: Callable[[Any], Tensor], step: Callable[[Any], Any], start: Any) -> Any:
        def packed(flat: Any) -> Any:
            return tf.nest.pack_sequence_as(start, flat)

        end = tf.while_loop(
            lambda *flat: goes_on(packed(flat)),
            lambda *flat: tf.nest.flatten(step(packed(flat))),
            tf.nest.flatten(start),
            parallel_iterations=1,
        )
        return packed(end)


LOOP_OPS: LoopOps = TfLoopOps()
