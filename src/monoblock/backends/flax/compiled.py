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


class Inputs(NamedTuple):
    """What a loop takes besides scores and cache: what every pass is given, the text and the numbers for the
    processors, how many tokens there are positions for and how many are wanted, and the source of draws."""

    constant: dict[str, Any]
    text: Text
    given: Given
    limits: Any
    key: Any


def inputs_of(generation: Any, program: Program) -> Inputs:
    """A call's inputs, after the prompt's pass."""
    decoder, setting, new = generation.decoder, generation.setting, generation.plan.new_tokens
    keys: Keys | None = generation.generator
    return Inputs(
        constant=decoder.constants(),
        text=program.text(setting.prompt_bn, setting.valid_bn),
        given=program.given(generation.fields, setting.prompt_bn, setting.valid_bn, new),
        # The last token takes no position: nothing comes after it.
        limits=np.array([min(new, decoder.room + 1), new], np.int32),
        key=keys.key if program.do_sample and keys is not None else np.zeros(2, np.uint32),
    )


def settle(generation: Any, program: Program, made: int, unfinished: bool, fine: bool, key: Any) -> None:
    """Count what a loop has made, and keep the key that its draws left; ValueError if there was nothing to draw, or no
    position for the next token of an unfinished text."""
    if not fine:
        raise ValueError(NOTHING_TO_DRAW)
    if program.do_sample and generation.generator is not None:
        generation.generator.key = key
    generation.decoder.advance(made - 1 + unfinished)


def run(generation: Any, program: Program) -> Any:
    """A whole call: the prompt's pass, then the loop."""
    decoder = generation.decoder
    text, record, scores_bv = generation.begin()
    inputs = inputs_of(generation, program)
    state, key, decoder.cache = _loop(
        decoder.network, program, decoder.params, decoder.cache, scores_bv, inputs
    )
    made, new_br, finished_b, fine = jax.device_get(state)
    unfinished = made < inputs.limits[1] and not finished_b.all()
    settle(generation, program, int(made), bool(unfinished), fine, key)
    text.extend(new_br[:, :made])
    return record.output(text.ids(), decoder)


@partial(jax.jit, static_argnames=("network", "program"), donate_argnames=("cache",))
def _loop(
    network: Network, program: Program, params: Any, cache: Cache, scores_bv: Array, inputs: Inputs
) -> tuple[Any, Array, Cache]:
    """The count of new tokens, the tokens, who is finished and whether all could be drawn; the key that is left; the
    cache."""
    constant, given = inputs.constant, inputs.given
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
        return (state.made < inputs.limits[0]) & ~state.finished_b.all() & state.fine

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
        text=Text(*(jnp.asarray(part) for part in inputs.text)),
        key=jnp.asarray(inputs.key),
        fine=jnp.ones((), jnp.bool_),
        cache=cache,
    )
    end = lax.while_loop(goes_on, step, chosen(scores_bv, start))
    return (end.made, end.new_br, end.finished_b, end.fine), end.key, end.cache
