"""Greedy decoding and sampling as one compiled program: a while loop over tokens, by the framework's own.

It begins with the cache and the scores that the prompt's pass left, and ends when every row has, so that nothing goes
to the host between tokens. Numbers (temperatures, limits) come in as arrays: other ones compile nothing.
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
# One pass over the next tokens: inputs by name, cache, what is options -> scores, cache and the rest (a `PassOutput`).
ForwardFn = Callable[[Mapping[str, Any], Any, ForwardOptions], Any]


class LoopStart(NamedTuple):
    """What a loop begins with: the scores of the first tokens, the cache, what the pass of every new token is given,
    the text and the numbers for the processors, how many tokens there are positions for and how many are options, the
    state of the random source, and what a search needs besides."""

    scores_bv: Array
    cache: Any
    constant: Mapping[str, Any]
    text: TokenBuffer
    given: ProgramInputs
    limits: Array
    draws: Any
    search: Any = ()


class LoopState(NamedTuple):
    """The loop's state: how many tokens are made, they themselves (rows, room), the last ones, who is finished, the
    text for the processors, the state of the random source, and whether every row had a token to draw."""

    made: Array
    new_br: Array
    token_b: Array
    finished_b: Array
    text: TokenBuffer
    draws: Any
    fine: Array
    cache: Any


class LoopOps(Protocol):
    """What a loop is made of in a framework."""

    xp: Namespace

    def draws(self, generator: Any, needed: bool) -> Any:
        """The state of a call's random source, as arrays; of no use unless `needed`."""
        ...

    def kept(self, generator: Any, draws: Any) -> None:
        """Let the call's random source go on from that state."""
        ...

    def source(self, draws: Any, fine: Array) -> Any:
        """A random source of that state, for `xp.sample` and `xp.draw`; `source.fine`: whether all could be drawn."""
        ...

    def state(self, source: Any) -> Any:
        """Its state."""
        ...

    def numbers(self, text: TokenBuffer, given: ProgramInputs) -> tuple[TokenBuffer, ProgramInputs]:
        """The text and the numbers for processors, of the types in which the framework computes."""
        ...

    def run(self, goes_on: Callable[[Any], Array], step: Callable[[Any], Any], start: Any) -> Any:
        """The framework's while loop over a nest of arrays."""
        ...


def run(generation: Any, program: Program) -> Any:
    """A whole call: the prompt's pass, then the loop."""
    xp = generation.decoder.passes.loop_ops.xp
    text, record, scores_bv = generation.prefill()
    end = ended(generation, program, scores_bv)
    made, new_br, finished_b = int(end.made), xp.to_numpy(end.new_br), xp.to_numpy(end.finished_b)
    unfinished = made < generation.plan.new_tokens and not finished_b.all()
    generation.decoder.advance(made - 1 + unfinished)
    text.extend(new_br[:, :made])
    return record.output(text.ids(), generation.decoder)


def ended(generation: Any, program: Program, scores_bv: Array, search: Any = ()) -> Any:
    """A loop's state at its end; ValueError if there was nothing to draw."""
    decoder, setting, new = generation.decoder, generation.context, generation.plan.new_tokens
    loop, prompts = decoder.passes.loop_ops, (setting.prompt_bn, setting.valid_bn)
    start = LoopStart(
        scores_bv=scores_bv,
        cache=decoder.cache,
        constant=decoder.constants(),
        text=program.token_buffer(*prompts),
        given=program.inputs(generation.fields, *prompts, new),
        # The last token takes no position: nothing comes after it.
        limits=np.array([min(new, decoder.room + 1), new], np.int32),
        draws=loop.draws(generation.generator, program.do_sample),
        search=search,
    )
    end = decoder.passes.run_loop(program, start)
    if not end.fine:
        raise ValueError(NOTHING_TO_DRAW)
    if program.do_sample and generation.generator is not None:
        loop.kept(generation.generator, end.draws)
    decoder.cache = end.cache
    return end


def token_loop(loop: LoopOps, forward: ForwardFn, program: Program, start: LoopStart) -> LoopState:
    """The loop, to be compiled into something: the state at its end."""
    xp = loop.xp
    rows = xp.size(start.scores_bv, 0)
    text, given = loop.numbers(start.text, start.given)
    columns_1n = np.arange(program.max_new_tokens, dtype=np.int32)[None]

    def chosen(scores_bv: Array, state: LoopState) -> LoopState:
        scores_bv = program.processed(xp, scores_bv, state.text, given)
        source = loop.source(state.draws, state.fine)
        token_b = xp.sample(scores_bv, source) if program.do_sample else xp.argmax(scores_bv)
        token_b = xp.where(state.finished_b, program.pad, xp.int32(token_b))
        return state._replace(
            made=state.made + 1,
            new_br=xp.where(columns_1n == state.made, token_b[:, None], state.new_br),
            token_b=token_b,
            finished_b=state.finished_b | program.ends(token_b),
            text=state.text.appended(xp, token_b),
            draws=loop.state(source),
            fine=source.fine,
        )

    def goes_on(state: LoopState) -> Array:
        return (state.made < start.limits[0]) & ~xp.all(state.finished_b) & state.fine

    def step(state: LoopState) -> LoopState:
        found = next_pass(forward, start, state.made, state.token_b[:, None], state.cache)
        return chosen(found.scores, state._replace(cache=found.cache))

    first = LoopState(
        made=xp.full((), 0),
        new_br=xp.full((rows, program.max_new_tokens), program.pad),
        token_b=xp.full((rows,), 0),
        finished_b=xp.full((rows,), False),
        text=text,
        draws=start.draws,
        fine=xp.full((), True),
        cache=start.cache,
    )
    return loop.run(goes_on, step, chosen(start.scores_bv, first))


def next_pass(forward: ForwardFn, start: LoopStart, made: Array, token_b1: Array, cache: Any) -> Any:
    """The pass of the last of the `made` new tokens."""
    tokens = {**start.constant, "input_ids": token_b1}
    if (before := start.constant.get("position_ids")) is not None:
        tokens["position_ids"] = before + made
    return forward(tokens, cache, NEXT)
