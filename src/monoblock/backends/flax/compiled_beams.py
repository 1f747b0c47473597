"""Beam search as one compiled program: a `lax.while_loop` over tokens, by the rules that all backends share."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from monoblock.backends.flax.arrays import Keys
from monoblock.backends.flax.cache import Cache
from monoblock.backends.flax.compiled import NEXT, OPS, Inputs, inputs_of, settle
from monoblock.backends.flax.network import Network
from monoblock.backends.flax.steps import passed
from monoblock.generation import beam_program as search
from monoblock.generation import beams
from monoblock.generation.programs import Program, Text


class State(NamedTuple):
    """The loop's state: how many tokens are made, the beams, the text for the processors, whether to go on, the
    source of draws, and whether there was something to draw."""

    made: Array
    running: search.Running
    text: Text
    going: Array
    key: Array
    fine: Array
    cache: Cache


def run(generation: Any, program: Program) -> Any:
    """A whole call: the prompt's pass, then the loop."""
    decoder, plan = generation.decoder, generation.plan
    _, record, scores_bv = generation.begin()
    inputs = inputs_of(generation, program)
    assert program.width is not None
    rules = beams.Rules.of(generation.config, plan.new_tokens)
    start = (search.begun(plan.batch, program.width, program.room), search.norms(rules, program.room))
    state, key, decoder.cache = _loop(
        decoder.network, program, decoder.params, decoder.cache, scores_bv, inputs, start
    )
    made, unfinished, running, fine = jax.device_get(state)
    settle(generation, program, int(made), bool(unfinished), fine, key)
    return beams.output(generation, search.best(running, generation.config.num_return_sequences or 1), record)


@partial(jax.jit, static_argnames=("network", "program"), donate_argnames=("cache",))
def _loop(
    network: Network,
    program: Program,
    params: Any,
    cache: Cache,
    scores_bv: Array,
    inputs: Inputs,
    begun: tuple[search.Running, Any],
) -> tuple[Any, Array, Cache]:
    """The count of new tokens, whether the search would go on, the beams and whether all could be drawn; the key that
    is left; the cache. `begun`: the first beams, and `beam_program.norms`."""
    constant, given, limits = inputs.constant, inputs.given, inputs.limits
    running, norms_n = begun
    width = program.width
    assert width is not None
    rows, vocab = scores_bv.shape
    prompts = rows // width.beams
    count = min(width.candidates, width.beams * vocab)

    def chosen(scores_bv: Array, state: State) -> State:
        logs_bv = program.processed(OPS, jax.nn.log_softmax(scores_bv), state.text, given)
        total_pw = (logs_bv + state.running.scores_pw.reshape(rows, 1)).reshape(prompts, -1)
        keys = Keys(state.key, state.fine)
        if program.do_sample:
            index_pk = OPS.draw(total_pw, count, keys)
            values_pk = OPS.take_along(total_pw, index_pk)
        else:
            values_pk, index_pk = lax.top_k(total_pw, count)
        token_pk = index_pk % vocab
        ends_pk = program.ends(token_pk) | (state.made + 1 == limits[1])
        found = search.Candidates(values_pk, index_pk // vocab, token_pk, ends_pk)
        running = search.advanced(OPS, width, state.running, found, state.made, norms_n)
        return state._replace(
            made=state.made + 1,
            running=running,
            going=search.goes_on(OPS, width, running, ends_pk),
            key=keys.key,
            fine=keys.fine,
        )

    def goes_on(state: State) -> Array:
        return (state.made < limits[0]) & state.going & state.fine

    def step(state: State) -> State:
        """Each beam goes on from the row that its last token was chosen from."""
        here = jnp.full((rows, 1), state.made - 1)
        row_b = jnp.take_along_axis(state.running.rows_rn, here, axis=1)[:, 0]
        token_b1 = jnp.take_along_axis(state.running.tokens_rn, here, axis=1)
        text = Text(state.text.ids_bt[row_b], state.text.valid_bt[row_b], state.text.length)
        tokens = dict(constant) | {"input_ids": token_b1}
        if (before := constant.get("position_ids")) is not None:
            tokens["position_ids"] = before + state.made
        found = passed(network, params, tokens, state.cache.reorder(row_b), NEXT)
        assert found.cache is not None
        return chosen(
            found.scores, state._replace(cache=found.cache, text=text.appended(OPS, token_b1[:, 0]))
        )

    start = State(
        made=jnp.zeros((), jnp.int32),
        running=jax.tree.map(jnp.asarray, running),
        text=jax.tree.map(jnp.asarray, inputs.text),
        going=jnp.ones((), jnp.bool_),
        key=jnp.asarray(inputs.key),
        fine=jnp.ones((), jnp.bool_),
        cache=cache,
    )
    end = lax.while_loop(goes_on, step, chosen(scores_bv, start))
    return (end.made, end.going, end.running, end.fine), end.key, end.cache
