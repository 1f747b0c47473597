"""Beam search as one graph: a `tf.while_loop` over tokens, by the rules that all backends share."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from monoblock.backends.tf.arrays import Seeds
from monoblock.backends.tf.cache import Cache
from monoblock.backends.tf.compiled import OPS, Start, as_floats, ended, next_pass, while_loop
from monoblock.backends.tf.ops import Tensor
from monoblock.generation import beam_program as search
from monoblock.generation import beams
from monoblock.generation.programs import Program, Text


class State(NamedTuple):
    """The loop's state: how many tokens are made, the beams, the text for the processors, whether to go on, how many
    draws were made, and whether there was something to draw."""

    made: Tensor
    running: search.Running
    text: Text
    going: Tensor
    draws: Tensor
    fine: Tensor
    cache: Cache


class Begun(NamedTuple):
    """What a search begins with: the beams, and what scores are divided by (see `beam_program.norms`)."""

    running: search.Running
    norms_n: Any


def run(generation: Any, program: Program) -> Any:
    """A whole call: the prompt's pass, then the loop."""
    _, record, scores_bv = generation.begin()
    end, _ = ended(generation, program, scores_bv, looped, begun(generation, program))
    generation.decoder.advance(int(end.made) - 1 + bool(end.going))
    running = search.Running(*(np.asarray(part) for part in end.running))
    return beams.output(generation, search.best(running, generation.config.num_return_sequences or 1), record)


def begun(generation: Any, program: Program) -> Begun:
    """The beginning of a call's search."""
    assert program.width is not None
    rules = beams.Rules.of(generation.config, generation.plan.new_tokens)
    running = search.begun(generation.plan.batch, program.width, program.room)
    return Begun(running, search.norms(rules, program.room))


def looped(model: Any, program: Program, start: Start) -> State:
    """The loop, to be traced into something: the state at its end."""
    width, begun = program.width, start.search
    assert width is not None
    rows, vocab = start.scores_bv.shape
    prompts = rows // width.beams
    count = min(width.candidates, width.beams * vocab)
    text, given = as_floats(start)

    def chosen(scores_bv: Tensor, state: State) -> State:
        logs_bv = program.processed(OPS, tf.nn.log_softmax(scores_bv), state.text, given)
        total_bv = logs_bv + tf.reshape(state.running.scores_pw, (rows, 1))
        total_pw = tf.reshape(total_bv, (prompts, width.beams * vocab))
        seeds = Seeds(start.seed, state.draws, state.fine)
        if program.do_sample:
            index_pk = tf.cast(OPS.draw(total_pw, count, seeds), tf.int32)  # the host's are int64, eagerly
            values_pk = OPS.take_along(total_pw, index_pk)
        else:
            values_pk, index_pk = OPS.top_k(total_pw, count)
        token_pk = index_pk % vocab
        ends_pk = program.ends(token_pk) | (state.made + 1 == start.limits[1])
        found = search.Candidates(values_pk, index_pk // vocab, token_pk, ends_pk)
        running = search.advanced(OPS, width, state.running, found, state.made, begun.norms_n)
        return state._replace(
            made=state.made + 1,
            running=running,
            going=search.goes_on(OPS, width, running, ends_pk),
            draws=seeds.count,
            fine=seeds.fine,
        )

    def goes_on(state: State) -> Tensor:
        return (state.made < start.limits[0]) & state.going & state.fine

    def step(state: State) -> State:
        """Each beam goes on from the row that its last token was chosen from."""
        row_b, token_b = (
            tf.gather(held_rn, state.made - 1, axis=1)
            for held_rn in (state.running.rows_rn, state.running.tokens_rn)
        )
        held = Text(
            tf.gather(state.text.ids_bt, row_b), tf.gather(state.text.valid_bt, row_b), state.text.length
        )
        found = next_pass(model, start, state.made, token_b[:, None], state.cache.reorder(row_b))
        return chosen(found.scores, state._replace(cache=found.cache, text=held.appended(OPS, token_b)))

    first = State(
        made=tf.zeros((), tf.int32),
        running=begun.running,
        text=text,
        going=tf.constant(True),
        draws=start.draws,
        fine=tf.constant(True),
        cache=start.cache,
    )
    return while_loop(goes_on, step, chosen(start.scores_bv, first))


def texts(running: search.Running, count: int, pad: int, new: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best `count` texts of each prompt as tensors: tokens (rows, new), pads after a text's end; scores; and the
    rows that the tokens were chosen from, -1 after the end."""
    (prompts, beams), room = running.ended_pw.shape, running.tokens_rn.shape[1]
    scores_pc = running.ended_pw[:, :count]
    possible_pc = scores_pc > -np.inf
    lengths_pc = tf.where(possible_pc, running.lengths_pw[:, :count], 0)
    real = tf.reshape(tf.range(new) < lengths_pc[:, :, None], (prompts * count, new))

    def best(held_rn: Tensor, fill: int) -> Tensor:
        held = tf.reshape(held_rn, (prompts, beams, room))[:, :count, :new]
        return tf.where(real, tf.reshape(held, (prompts * count, new)), fill)

    scores = tf.where(possible_pc, scores_pc, search.HOPELESS)
    return (
        best(running.ended_tokens_rn, pad),
        tf.reshape(scores, (prompts * count,)),
        best(running.ended_rows_rn, -1),
    )
