"""Greedy decoding and sampling as one graph: a `tf.while_loop` over tokens, which XLA compiles where it is asked to.

It begins with the cache and the scores that the prompt's pass left, and ends when every row has, so that nothing goes
to the host between tokens. Numbers (temperatures, limits) come in as tensors: other ones trace nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from monoblock.backends.tf.arrays import Seeds, TfOps, fresh_seeds
from monoblock.backends.tf.cache import Cache
from monoblock.backends.tf.inputs import Wanted
from monoblock.backends.tf.ops import Tensor, size
from monoblock.backends.tf.steps import Given as Inputs
from monoblock.backends.tf.steps import Pass, passed
from monoblock.generation.arrays import NOTHING_TO_DRAW
from monoblock.generation.programs import Given, Program, Text

OPS = TfOps()
NEXT = Wanted(fresh=False, keep=1)


class Start(NamedTuple):
    """What a loop begins with: the scores of the first tokens, the cache, what the pass of every new token is given,
    the text and the numbers for the processors, how many tokens there are positions for and how many are wanted, the
    seed of the draws with the count of those that were made, and what a search needs besides."""

    scores_bv: Tensor
    cache: Cache
    constant: Inputs
    text: Text
    given: Given
    limits: Tensor
    seed: Tensor
    draws: Tensor
    search: Any = ()


class State(NamedTuple):
    """The loop's state: how many tokens are made, they themselves (rows, room), the last ones, who is finished, the
    text for the processors, how many draws were made, and whether every row had a token to draw."""

    made: Tensor
    new_br: Tensor
    token_b: Tensor
    finished_b: Tensor
    text: Text
    draws: Tensor
    fine: Tensor
    cache: Cache


def run(generation: Any, program: Program) -> Any:
    """A whole call: the prompt's pass, then the loop."""
    text, record, scores_bv = generation.begin()
    decoder, new = generation.decoder, generation.plan.new_tokens
    end, limit = ended(generation, program, scores_bv, looped)
    count = int(end.made)
    decoder.advance(count - 1 + (count == limit < new and not bool(tf.reduce_all(end.finished_b))))
    text.extend(end.new_br[:, :count].numpy())
    return record.output(text.ids(), decoder)


def ended(
    generation: Any, program: Program, scores_bv: Tensor, loop: Callable[..., Any], search: Any = ()
) -> tuple[Any, int]:
    """A loop's state at its end, and how many tokens there were positions for; ValueError if nothing could be drawn."""
    decoder, setting, new = generation.decoder, generation.setting, generation.plan.new_tokens
    model, prompts = decoder.model, (setting.prompt_bn, setting.valid_bn)
    # The last token takes no position: nothing comes after it.
    limit = min(new, decoder.room + 1)
    seeds = generation.generator or (fresh_seeds() if program.do_sample else Seeds((0, 0)))
    start = Start(
        scores_bv=scores_bv,
        cache=decoder.in_place(),
        constant=decoder.constants(),
        text=program.text(*prompts),
        given=program.given(generation.fields, *prompts, new),
        limits=tf.constant((limit, new), tf.int32),
        seed=seeds.seed,
        draws=tf.constant(seeds.count, tf.int32),
        search=search,
    )
    end = decoder.steps.run(("loop", program), lambda start: loop(model, program, start), start)
    if not end.fine:
        raise ValueError(NOTHING_TO_DRAW)
    seeds.count, decoder.cache = int(end.draws), end.cache
    return end, limit


def looped(model: Any, program: Program, start: Start) -> State:
    """The loop, to be traced into something: the state at its end."""
    rows = size(start.scores_bv, 0)
    text, given = as_floats(start)

    def chosen(scores_bv: Tensor, state: State) -> State:
        scores_bv = program.processed(OPS, scores_bv, state.text, given)
        seeds = Seeds(start.seed, state.draws, state.fine)
        token_b = OPS.sample(scores_bv, seeds) if program.do_sample else OPS.argmax(scores_bv)
        token_b = tf.where(state.finished_b, program.pad, tf.cast(token_b, tf.int32))
        here = tf.range(program.room)[None] == state.made
        return state._replace(
            made=state.made + 1,
            new_br=tf.where(here, token_b[:, None], state.new_br),
            token_b=token_b,
            finished_b=state.finished_b | program.ends(token_b),
            text=state.text.appended(OPS, token_b),
            draws=seeds.count,
            fine=seeds.fine,
        )

    def goes_on(state: State) -> Tensor:
        return (state.made < start.limits[0]) & ~tf.reduce_all(state.finished_b) & state.fine

    def step(state: State) -> State:
        found = next_pass(model, start, state.made, state.token_b[:, None], state.cache)
        return chosen(found.scores, state._replace(cache=found.cache))

    first = State(
        made=tf.zeros((), tf.int32),
        new_br=tf.fill((rows, program.room), program.pad),
        token_b=tf.zeros(rows, tf.int32),
        finished_b=tf.zeros(rows, tf.bool),
        text=text,
        draws=start.draws,
        fine=tf.constant(True),
        cache=start.cache,
    )
    return while_loop(goes_on, step, chosen(start.scores_bv, first))


def next_pass(model: Any, start: Start, made: Tensor, token_b1: Tensor, cache: Cache) -> Pass:
    """The pass of the last of the `made` new tokens."""
    tokens = {**start.constant, "input_ids": token_b1}
    if (before := start.constant.get("position_ids")) is not None:
        tokens["position_ids"] = before + made
    return passed(model, tokens, cache, NEXT)


def while_loop(goes_on: Callable[[Any], Tensor], step: Callable[[Any], Any], start: Any) -> Any:
    """`tf.while_loop` over a state of any structure."""

    def packed(flat: Any) -> Any:
        return tf.nest.pack_sequence_as(start, flat)

    end = tf.while_loop(
        lambda *flat: goes_on(packed(flat)),
        lambda *flat: tf.nest.flatten(step(packed(flat))),
        tf.nest.flatten(start),
        parallel_iterations=1,
    )
    return packed(end)


def as_floats(start: Start) -> tuple[Text, Given]:
    """The text and the numbers for processors, with lengths and numbers as float32, in which they are exact:
    TensorFlow computes with one kind of number at a time, and a processor may raise a number to a length's power."""

    def wide(x: Any) -> Tensor:
        return tf.cast(x, tf.float32)

    def measured(text: Text) -> Text:
        return text._replace(length=wide(text.length))

    given = start.given
    numbers = {name: wide(value) for name, value in given.numbers.items()}
    return measured(start.text), Given(numbers, measured(given.prompt), wide(given.max_length))
