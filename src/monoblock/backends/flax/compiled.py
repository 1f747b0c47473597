"""Greedy decoding and sampling as one compiled program: a `lax.while_loop` over tokens.

It begins with the cache and the scores that the prompt's pass left, and ends when every row has, so that nothing goes
to the host between tokens. Numbers (temperatures, limits) come in as arrays: other ones compile nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from monoblock.backends.flax.arrays import JaxOps, Keys
from monoblock.backends.flax.cache import Cache
from monoblock.backends.flax.inputs import Wanted
from monoblock.backends.flax.network import Network
from monoblock.backends.flax.steps import passed
from monoblock.generation.arrays import NOTHING_TO_DRAW
from monoblock.generation.programs import Given, Program, Text

OPS = JaxOps()
NEXT = Wanted(fresh=False, keep=1)


class State(NamedTuple):
    """The loop's state: how many tokens are made, they themselves (rows, room), the last ones, who is finished, the
    text for the processors, the source of draws, and whether every row had a token to draw."""

    made: Array
    new_br: Array
    token_b: Array
    finished_b: Array
    text: Text
    key: Array
    fine: Array
    cache: Cache


def run(generation: Any, program: Program) -> Any:
    """A whole call: the prompt's pass, then the loop."""
    decoder, setting = generation.decoder, generation.setting
    text, record, scores_bv = generation.begin()
    prompt_bn, valid_bn = setting.prompt_bn, setting.valid_bn
    new = generation.plan.new_tokens
    # The last token takes no position: nothing comes after it.
    limit = min(new, decoder.room + 1)
    keys: Keys | None = generation.generator
    state, decoder.cache = _loop(
        decoder.network,
        program,
        decoder.params,
        decoder.cache,
        decoder.constants(),
        scores_bv,
        program.text(prompt_bn, valid_bn),
        program.given(generation.fields, prompt_bn, valid_bn, new),
        np.int32(limit),
        keys.key if program.do_sample and keys is not None else np.zeros(2, np.uint32),
    )
    made, new_br, finished_b, fine, key = jax.device_get(state)
    if not fine:
        raise ValueError(NOTHING_TO_DRAW)
    if program.do_sample and keys is not None:
        keys.key = jnp.asarray(key)
    count = int(made)
    decoder.advance(count - 1 + (count == limit < new and not finished_b.all()))
    text.extend(new_br[:, :count])
    return record.output(text.ids(), decoder)


@partial(jax.jit, static_argnames=("network", "program"), donate_argnames=("cache",))
def _loop(
    network: Network,
    program: Program,
    params: Any,
    cache: Cache,
    constant: dict[str, Any],
    scores_bv: Array,
    text: Text,
    given: Given,
    limit: Array,
    key: Array,
) -> tuple[Any, Cache]:
    """The count of new tokens, the tokens, who is finished, whether all could be drawn, the key; and the cache."""
    rows = scores_bv.shape[0]

    def chosen(scores_bv: Array, state: State) -> State:
        scores_bv = program.processed(OPS, scores_bv, state.text, given)
        keys = Keys(state.key, state.fine)
        token_b = OPS.sample(scores_bv, keys) if program.do_sample else jnp.argmax(scores_bv, axis=-1)
        token_b = jnp.where(state.finished_b, program.pad, token_b).astype(jnp.int32)
        return state._replace(
            made=state.made + 1,
            new_br=lax.dynamic_update_slice_in_dim(state.new_br, token_b[:, None], state.made, axis=1),
            token_b=token_b,
            finished_b=state.finished_b | program.ends(token_b),
            text=state.text.appended(OPS, token_b),
            key=keys.key,
            fine=keys.fine,
        )

    def goes_on(state: State) -> Array:
        return (state.made < limit) & ~state.finished_b.all() & state.fine

    def step(state: State) -> State:
        tokens = dict(constant) | {"input_ids": state.token_b[:, None]}
        if (before := constant.get("position_ids")) is not None:
            tokens["position_ids"] = before + state.made
        found = passed(network, params, tokens, state.cache, NEXT)
        assert found.cache is not None
        return chosen(found.scores, state._replace(cache=found.cache))

    start = State(
        made=jnp.zeros((), jnp.int32),
        new_br=jnp.full((rows, program.room), program.pad, jnp.int32),
        token_b=jnp.zeros(rows, jnp.int32),
        finished_b=jnp.zeros(rows, jnp.bool_),
        text=Text(*(jnp.asarray(part) for part in text)),
        key=key,
        fine=jnp.ones((), jnp.bool_),
        cache=cache,
    )
    end = lax.while_loop(goes_on, step, chosen(scores_bv, start))
    return (end.made, end.new_br, end.finished_b, end.fine, end.key), end.cache
