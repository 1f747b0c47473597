"""Beam search as one compiled program: a while loop over tokens, by the rules that all backends share."""

from __future__ import annotations

from typing import Any, NamedTuple

from monoblock.backends.xla.compiled import ForwardFn, LoopOps, LoopStart, ended, next_pass
from monoblock.backends.xla.namespace import Array
from monoblock.generation import beam_program as search
from monoblock.generation import beams
from monoblock.generation.compiled_loop import Program, TokenBuffer


class BeamLoopState(NamedTuple):
    """The loop's state: how many tokens are made, the beams, the text for the processors, whether to go on, the state
    of the random source, and whether there was something to draw."""

    made: Array
    running: search.BeamState
    text: TokenBuffer
    going: Array
    draws: Any
    fine: Array
    cache: Any


class BeamStart(NamedTuple):
    """What a search begins with: the beams, and what scores are divided by (see `beam_program.norms`)."""

    running: search.BeamState
    norms_n: Any


def run(generation: Any, program: Program) -> Any:
    """A whole call: the prompt's pass, then the loop."""
    _, record, scores_bv = generation.prefill()
    end = ended(generation, program, scores_bv, beam_start(generation, program))
    generation.decoder.advance(int(end.made) - 1 + bool(end.going))
    xp = generation.decoder.passes.loop_ops.xp
    running = search.BeamState(*(xp.to_numpy(part) for part in end.running))
    return beams.output(generation, search.best(running, generation.config.num_return_sequences or 1), record)


def beam_start(generation: Any, program: Program) -> BeamStart:
    """The beginning of a call's search, on the host."""
    assert program.search is not None
    rules = beams.BeamScorer.of(generation.config, generation.plan.new_tokens)
    running = search.initial_beams(generation.plan.batch, program.search, program.max_new_tokens)
    return BeamStart(running, search.norms(rules, program.max_new_tokens))


def beam_loop(loop: LoopOps, forward: ForwardFn, program: Program, start: LoopStart) -> BeamLoopState:
    """The loop, to be compiled into something: the state at its end."""
    xp, width, begun = loop.xp, program.search, start.search
    assert width is not None
    rows, vocab = start.scores_bv.shape
    prompts = rows // width.beams
    count = min(width.candidates, width.beams * vocab)
    text, given = loop.numbers(start.text, start.given)

    def chosen(scores_bv: Array, state: BeamLoopState) -> BeamLoopState:
        logs_bv = program.processed(xp, xp.log_softmax(scores_bv), state.text, given)
        total_bv = logs_bv + xp.reshape(state.running.scores_pw, (rows, 1))
        total_pw = xp.reshape(total_bv, (prompts, width.beams * vocab))
        source = loop.source(state.draws, state.fine)
        if program.do_sample:
            index_pk = xp.int32(xp.draw(total_pw, count, source))  # those that are drawn eagerly are int64
            values_pk = xp.take_along(total_pw, index_pk)
        else:
            values_pk, index_pk = xp.top_k(total_pw, count)
        token_pk = index_pk % vocab
        ends_pk = program.ends(token_pk) | (state.made + 1 == start.limits[1])
        found = search.Candidates(values_pk, index_pk // vocab, token_pk, ends_pk)
        running = search.advance(xp, width, state.running, found, state.made, begun.norms_n)
        return state._replace(
            made=state.made + 1,
            running=running,
            going=search.continues(xp, width, running, ends_pk),
            draws=loop.state(source),
            fine=source.fine,
        )

    def goes_on(state: BeamLoopState) -> Array:
        return (state.made < start.limits[0]) & state.going & state.fine

    def step(state: BeamLoopState) -> BeamLoopState:
        """Each beam goes on from the row that its last token was chosen from."""
        last_b1 = xp.full((rows, 1), 0) + (state.made - 1)
        row_b = xp.take_along(state.running.rows_rn, last_b1)[:, 0]
        token_b1 = xp.take_along(state.running.tokens_rn, last_b1)
        ids_bt, valid_bt = (xp.take_rows(x, row_b) for x in (state.text.ids_bt, state.text.valid_bt))
        text = TokenBuffer(ids_bt, valid_bt, state.text.length).appended(xp, token_b1[:, 0])
        found = next_pass(forward, start, state.made, token_b1, state.cache.reorder(row_b))
        return chosen(found.scores, state._replace(cache=found.cache, text=text))

    first = BeamLoopState(
        made=xp.full((), 0),
        running=begun.running,
        text=text,
        going=xp.full((), True),
        draws=start.draws,
        fine=xp.full((), True),
        cache=start.cache,
    )
    return loop.run(goes_on, step, chosen(start.scores_bv, first))
