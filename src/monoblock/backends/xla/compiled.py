"""Greedy decoding and sampling as one compiled program, the framework's while loop over tokens.

The loop starts from the cache and the scores of the prefill and stops when all rows are finished; nothing is
transferred to the host between tokens. Numbers (temperatures, limits) are array arguments: new values compile nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from monoblock.backends.xla.inputs import ForwardOptions
from monoblock.backends.xla.namespace import Array, Namespace
from monoblock.generation.arrays import NOTHING_TO_DRAW
from monoblock.generation.compiled_loop import Program, ProgramInputs, TokenBuffer

NEXT = ForwardOptions(fresh=False, keep=1)
# A pass over the next tokens: inputs by name, cache, options -> `PassOutput`.
ForwardFn = Callable[[Mapping[str, Any], Any, ForwardOptions], Any]


class LoopStart(NamedTuple):
    """The inputs of a loop: the scores of the first new token, the cache, the inputs that every pass shares, the token
    buffer and the numbers for the logits processors, (tokens with a position, tokens to generate), the state of the
    random number generator, and the `BeamStart` of a beam search."""

    scores_bv: Array
    cache: Any
    fixed_inputs: Mapping[str, Any]
    buffer: TokenBuffer
    inputs: ProgramInputs
    limits: Array
    rng_state: Any
    search: Any = ()


class LoopState(NamedTuple):
    """The state of a loop: the number of new tokens, the new tokens (rows, max_new_tokens), the last ones, the finished
    rows, the token buffer for the logits processors, the state of the random number generator, and whether every row
    had a token with a nonzero probability."""

    steps: Array
    tokens_br: Array
    token_b: Array
    finished_b: Array
    buffer: TokenBuffer
    rng_state: Any
    can_sample: Array
    cache: Any


class LoopOps(Protocol):
    """The operations of a loop that depend on the framework."""

    xp: Namespace

    def rng_state(self, generator: Any, needed: bool) -> Any:
        """The state of a call's random number generator, as arrays; arbitrary unless `needed`."""
        ...

    def set_rng_state(self, generator: Any, rng_state: Any) -> None:
        """Set the state of the call's random number generator."""
        ...

    def rng(self, rng_state: Any, can_sample: Array) -> Any:
        """A generator of that state, for `xp.sample` and `xp.draw`; it updates `can_sample`."""
        ...

    def state_of(self, rng: Any) -> Any:
        """The state of a generator."""
        ...

    def cast_inputs(self, buffer: TokenBuffer, inputs: ProgramInputs) -> tuple[TokenBuffer, ProgramInputs]:
        """The buffer and the processors' numbers in the dtypes in which the framework computes."""
        ...

    def while_loop(self, condition: Callable[[Any], Array], body: Callable[[Any], Any], start: Any) -> Any:
        """The framework's while loop; its state is a nest of arrays."""
        ...


def run(generation: Any, program: Program) -> Any:
    """A call of `generate`: the prefill, then the loop."""
    xp = generation.decoder.passes.loop_ops.xp
    buffer, collector, scores_bv = generation.prefill()
    state = run_loop(generation, program, scores_bv)
    steps, tokens_br, finished_b = (
        int(state.steps),
        xp.to_numpy(state.tokens_br),
        xp.to_numpy(state.finished_b),
    )
    unfinished = steps < generation.plan.new_tokens and not finished_b.all()
    generation.decoder.advance(steps - 1 + unfinished)
    buffer.extend(tokens_br[:, :steps])
    return collector.output(buffer.ids(), generation.decoder)


def run_loop(generation: Any, program: Program, scores_bv: Array, search: Any = ()) -> Any:
    """Run a loop; its final state. ValueError if a row had no token to sample."""
    decoder, context, new = generation.decoder, generation.context, generation.plan.new_tokens
    loop, prompts = decoder.passes.loop_ops, (context.prompt_bn, context.valid_bn)
    start = LoopStart(
        scores_bv=scores_bv,
        cache=decoder.cache,
        fixed_inputs=decoder.fixed_inputs(),
        buffer=program.token_buffer(*prompts),
        inputs=program.inputs(generation.fields, *prompts, new),
        # The last token is never an input, so it needs no position.
        limits=np.array([min(new, decoder.room + 1), new], np.int32),
        rng_state=loop.rng_state(generation.generator, program.do_sample),
        search=search,
    )
    state = decoder.passes.run_loop(program, start)
    if not state.can_sample:
        raise ValueError(NOTHING_TO_DRAW)
    if program.do_sample and generation.generator is not None:
        loop.set_rng_state(generation.generator, state.rng_state)
    decoder.cache = state.cache
    return state


def token_loop(loop: LoopOps, forward: ForwardFn, program: Program, start: LoopStart) -> LoopState:
    """The loop, to be compiled into a program; its final state."""
    xp = loop.xp
    rows = xp.size(start.scores_bv, 0)
    buffer, inputs = loop.cast_inputs(start.buffer, start.inputs)
    columns_1n = np.arange(program.max_new_tokens, dtype=np.int32)[None]

    def select_token(scores_bv: Array, state: LoopState) -> LoopState:
        scores_bv = program.processed(xp, scores_bv, state.buffer, inputs)
        rng = loop.rng(state.rng_state, state.can_sample)
        token_b = xp.sample(scores_bv, rng) if program.do_sample else xp.argmax(scores_bv)
        token_b = xp.where(state.finished_b, program.pad, xp.int32(token_b))
        return state._replace(
            steps=state.steps + 1,
            tokens_br=xp.where(columns_1n == state.steps, token_b[:, None], state.tokens_br),
            token_b=token_b,
            finished_b=state.finished_b | program.ends(token_b),
            buffer=state.buffer.appended(xp, token_b),
            rng_state=loop.state_of(rng),
            can_sample=rng.can_sample,
        )

    def condition(state: LoopState) -> Array:
        return (state.steps < start.limits[0]) & ~xp.all(state.finished_b) & state.can_sample

    def body(state: LoopState) -> LoopState:
        found = next_pass(forward, start, state.steps, state.token_b[:, None], state.cache)
        return select_token(found.scores, state._replace(cache=found.cache))

    initial = LoopState(
        steps=xp.full((), 0),
        tokens_br=xp.full((rows, program.max_new_tokens), program.pad),
        token_b=xp.full((rows,), 0),
        finished_b=xp.full((rows,), False),
        buffer=buffer,
        rng_state=start.rng_state,
        can_sample=xp.full((), True),
        cache=start.cache,
    )
    return loop.while_loop(condition, body, select_token(start.scores_bv, initial))


def next_pass(forward: ForwardFn, start: LoopStart, steps: Array, token_b1: Array, cache: Any) -> Any:
    """The pass whose input is the last of the `steps` new tokens."""
    tokens = {**start.fixed_inputs, "input_ids": token_b1}
    if (before := start.fixed_inputs.get("position_ids")) is not None:
        tokens["position_ids"] = before + steps
    return forward(tokens, cache, NEXT)
