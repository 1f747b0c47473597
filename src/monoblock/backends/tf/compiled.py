"""The operations of generation loops on TensorFlow: `tf.while_loop`, and seeds."""

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
    """`LoopOps` for TensorFlow; see the protocol for the methods. The state of a random number generator is its seed
    and the number of draws."""

    xp: Namespace = XP

    def rng_state(self, generator: Seeds | None, needed: bool) -> tuple[Tensor, Tensor]:
        seeds = generator or (fresh_seeds() if needed else Seeds((0, 0)))
        return seeds.seed, tf.constant(seeds.count, tf.int32)

    def set_rng_state(self, generator: Seeds, rng_state: tuple[Tensor, Tensor]) -> None:
        generator.count = int(rng_state[1])

    def rng(self, rng_state: tuple[Tensor, Tensor], can_sample: Tensor) -> Seeds:
        return Seeds(*rng_state, can_sample)

    def state_of(self, rng: Seeds) -> tuple[Tensor, Tensor]:
        return rng.seed, rng.count

    def cast_inputs(self, buffer: TokenBuffer, inputs: ProgramInputs) -> tuple[TokenBuffer, ProgramInputs]:
        # As float32, in which they are exact: TensorFlow does not promote dtypes, and a processor may compute a power
        # with a length as the exponent.
        def to_float(x: Any) -> Tensor:
            return tf.cast(x, tf.float32)

        def cast_length(buffer: TokenBuffer) -> TokenBuffer:
            return buffer._replace(length=to_float(buffer.length))

        numbers = {name: to_float(value) for name, value in inputs.numbers.items()}
        return cast_length(buffer), ProgramInputs(
            numbers, cast_length(inputs.prompt), to_float(inputs.max_length)
        )

    def while_loop(self, condition: Callable[[Any], Tensor], body: Callable[[Any], Any], start: Any) -> Any:
        def nested(flat: Any) -> Any:
            return tf.nest.pack_sequence_as(start, flat)

        state = tf.while_loop(
            lambda *flat: condition(nested(flat)),
            lambda *flat: tf.nest.flatten(body(nested(flat))),
            tf.nest.flatten(start),
            parallel_iterations=1,
        )
        return nested(state)


LOOP_OPS: LoopOps = TfLoopOps()
