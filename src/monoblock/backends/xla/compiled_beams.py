"""Beam search as one compiled program: a while loop over tokens, with the rules that all backends share."""

from __future__ import annotations

from typing import Any, NamedTuple

from monoblock.backends.xla.compiled import ForwardFn, LoopOps, LoopStart, next_pass, run_loop
from monoblock.backends.xla.namespace import Array
from monoblock.generation import beam_program as search
from monoblock.generation import beams
from monoblock.generation.compiled_loop import Program, TokenBuffer


class BeamLoopState(NamedTuple):
    """The state of the loop: the number of new tokens, the beams, the token buffer for the logits processors, whether
    a search is unfinished, the state of the random number generator, and whether every row had a token to sample."""

    steps: Array
    beam_state: search.BeamState
    buffer: TokenBuffer
    unfinished: Array
    rng_state: Any
    can_sample: Array
    cache: Any


class BeamStart(NamedTuple):
    """The inputs of a search: the initial beams, and the divisors of the scores (`beam_program.norms`)."""

    beam_state: search.BeamState
    norms_n: Any


def run(generation: Any, program: Program) -> Any:
    """A call of `generate`: the prefill, then the loop."""
    _, collector, scores_bv = generation.prefill()
    state = run_loop(generation, program, scores_bv, beam_start(generation, program))
    generation.decoder.advance(int(state.steps) - 1 + bool(state.unfinished))
    xp = generation.decoder.passes.loop_ops.xp
    beam_state = search.BeamState(*(xp.to_numpy(part) for part in state.beam_state))
    return beams.output(
        generation, search.best(beam_state, generation.config.num_return_sequences or 1), collector
    )


def beam_start(generation: Any, program: Program) -> BeamStart:
    """The initial state of a search, on the host."""
    assert program.search is not None
    rules = beams.BeamScorer.of(generation.config, generation.plan.new_tokens)
    beam_state = search.initial_beams(generation.plan.batch, program.search, program.max_new_tokens)
    return BeamStart(beam_state, search.norms(rules, program.max_new_tokens))


def beam_loop(loop: LoopOps, forward: ForwardFn, program: Program, start: LoopStart) -> BeamLoopState:
    """The loop, to be compiled into a program; its final state."""
    xp, config, beam_start = loop.xp, program.search, start.search
    assert config is not None
    rows, vocab = start.scores_bv.shape
    prompts = rows // config.beams
    count = min(config.candidates, config.beams * vocab)
    buffer, inputs = loop.cast_inputs(start.buffer, start.inputs)

    def select_beams(scores_bv: Array, state: BeamLoopState) -> BeamLoopState:
        logs_bv = program.processed(xp, xp.log_softmax(scores_bv), state.buffer, inputs)
        total_bv = logs_bv + xp.reshape(state.beam_state.scores_pw, (rows, 1))
        total_pw = xp.reshape(total_bv, (prompts, config.beams * vocab))
        rng = loop.rng(state.rng_state, state.can_sample)
        if program.do_sample:
            index_pk = xp.int32(xp.draw(total_pw, count, rng))  # indices drawn eagerly are int64
            values_pk = xp.take_along(total_pw, index_pk)
        else:
            values_pk, index_pk = xp.top_k(total_pw, count)
        token_pk = index_pk % vocab
        ends_pk = program.ends(token_pk) | (state.steps + 1 == start.limits[1])
        found = search.Candidates(values_pk, index_pk // vocab, token_pk, ends_pk)
        beam_state = search.advance(xp, config, state.beam_state, found, state.steps, beam_start.norms_n)
        return state._replace(
            steps=state.steps + 1,
            beam_state=beam_state,
            unfinished=search.continues(xp, config, beam_state, ends_pk),
            rng_state=loop.state_of(rng),
            can_sample=rng.can_sample,
        )

    def condition(state: BeamLoopState) -> Array:
        return (state.steps < start.limits[0]) & state.unfinished & state.can_sample

    def body(state: BeamLoopState) -> BeamLoopState:
        """Each beam continues the row that its last token was selected from."""
        last_b1 = xp.full((rows, 1), 0) + (state.steps - 1)
        row_b = xp.take_along(state.beam_state.rows_rn, last_b1)[:, 0]
        token_b1 = xp.take_along(state.beam_state.tokens_rn, last_b1)
        ids_bt, valid_bt = (xp.take_rows(x, row_b) for x in (state.buffer.ids_bt, state.buffer.valid_bt))
        buffer = TokenBuffer(ids_bt, valid_bt, state.buffer.length).appended(xp, token_b1[:, 0])
        found = next_pass(forward, start, state.steps, token_b1, state.cache.reorder(row_b))
        return select_beams(found.scores, state._replace(cache=found.cache, buffer=buffer))

    initial = BeamLoopState(
        steps=xp.full((), 0),
        beam_state=beam_start.beam_state,
        buffer=buffer,
        unfinished=xp.full((), True),
        rng_state=start.rng_state,
        can_sample=xp.full((), True),
        cache=start.cache,
    )
    return loop.while_loop(condition, body, select_beams(start.scores_bv, initial))
