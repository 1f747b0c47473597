"""Beam search inside a compiled program: the rules of `beams.py` on arrays of fixed shapes.

Shape suffixes: p prompts, w beams, k candidates, n new tokens that fit; r rows, which are p * w.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from monoblock.generation.arrays import Array, ArrayOps
from monoblock.generation.beams import HOPELESS, Beam, Rules
from monoblock.generation.scores import NEVER


@dataclass(frozen=True)
class BeamConfig:
    """What of a search is compiled in. `early`: a prompt is done when enough texts have ended; `far`: not before no
    length could make another one better."""

    beams: int
    candidates: int
    early: bool
    far: bool

    @classmethod
    def of(cls, rules: Rules, eos: int) -> BeamConfig:
        """The width of a search with so many tokens that end a text."""
        return cls(
            beams=rules.width,
            candidates=max(2, 1 + eos) * rules.width,
            early=rules.early_stopping is True,
            far=rules.early_stopping == "never" and rules.length_penalty > 0,
        )


def norms(rules: Rules, room: int) -> np.ndarray[Any, Any]:
    """What scores of 1, 2, ... `room` new tokens are divided by, and at last those of the longest text."""
    return np.array([rules.norm(n) for n in (*range(1, room + 1), rules.longest)], np.float32)


class BeamState(NamedTuple):
    """The beams that go on, and the best that have ended (score -inf: none yet); whether a prompt is still open."""

    scores_pw: Array
    tokens_rn: Array
    rows_rn: Array
    ended_pw: Array
    ended_tokens_rn: Array
    ended_rows_rn: Array
    lengths_pw: Array
    open_p1: Array


class Candidates(NamedTuple):
    """The likeliest continuations of each prompt: score, the beam that goes on, the token, and whether it ends."""

    scores_pk: Array
    parents_pk: Array
    tokens_pk: Array
    ends_pk: Array


def initial_beams(prompts: int, config: BeamConfig, room: int) -> BeamState:
    """All beams are the prompt: only the first one's continuations count. On the host."""
    scores_pw = np.full((prompts, config.beams), HOPELESS, np.float32)
    scores_pw[:, 0] = 0
    none_rn = np.zeros((prompts * config.beams, room), np.int32)
    return BeamState(
        scores_pw=scores_pw,
        tokens_rn=none_rn,
        rows_rn=none_rn,
        ended_pw=np.full_like(scores_pw, NEVER),
        ended_tokens_rn=none_rn,
        ended_rows_rn=none_rn,
        lengths_pw=np.zeros_like(scores_pw, np.int32),
        open_p1=np.ones((prompts, 1), np.bool_),
    )


def advance(
    ops: ArrayOps, config: BeamConfig, running: BeamState, found: Candidates, made: Array, norms_n: Array
) -> BeamState:
    """The beams after one more token; `made` is how many they had, `norms_n` see `norms`."""
    (prompts, count), beams = found.scores_pk.shape, config.beams
    room = running.tokens_rn.shape[1]
    prompt_p1 = np.arange(prompts, dtype=np.int32)[:, None]
    here_1n = np.arange(room, dtype=np.int32)[None] == made
    norm_1 = ops.take_rows(norms_n, ops.reshape(made, (1,)))
    # All candidates as texts, one row after the other.
    parent_k = ops.reshape(prompt_p1 * beams + found.parents_pk, (prompts * count,))
    token_k1 = ops.reshape(found.tokens_pk, (prompts * count, 1))
    texts = tuple(
        ops.where(here_1n, new_k1, ops.take_rows(held_rn, parent_k))
        for new_k1, held_rn in ((token_k1, running.tokens_rn), (parent_k[:, None], running.rows_rn))
    )
    # Those among the first that end compete with those that have ended before.
    first_pw, ends_pw = found.scores_pk[:, :beams], found.ends_pk[:, :beams]
    takes_p1 = running.open_p1 & ~_full(ops, running.ended_pw) if config.early else running.open_p1
    joins_pw = ends_pw & (first_pw > HOPELESS / 2) & takes_p1
    joining_pw = ops.where(joins_pw, first_pw / norm_1, NEVER)
    ended_pw, place_pw = ops.top_k(ops.concat([running.ended_pw, joining_pw]), beams)
    place_r = ops.reshape(prompt_p1 * (2 * beams) + place_pw, (prompts * beams,))

    def pooled(held_rn: Array, new_kn: Array) -> Array:
        held = ops.reshape(held_rn, (prompts, beams, room))
        both = ops.concat([held, ops.reshape(new_kn, (prompts, count, room))[:, :beams]])
        return ops.take_rows(ops.reshape(both, (prompts * 2 * beams, room)), place_r)

    length_pw = running.lengths_pw * 0 + made + 1
    # The best that do not end go on.
    going_pk = ops.where(found.ends_pk, found.scores_pk + np.float32(HOPELESS), found.scores_pk)
    scores_pw, going_pw = ops.top_k(going_pk, beams)
    going_r = ops.reshape(prompt_p1 * count + going_pw, (prompts * beams,))
    reach_p1 = scores_pw[:, :1] / (norms_n[-1:] if config.far else norm_1)
    better_p1 = ~_full(ops, ended_pw) | (reach_p1 > ended_pw[:, -1:])
    return BeamState(
        scores_pw=scores_pw,
        tokens_rn=ops.take_rows(texts[0], going_r),
        rows_rn=ops.take_rows(texts[1], going_r),
        ended_pw=ended_pw,
        ended_tokens_rn=pooled(running.ended_tokens_rn, texts[0]),
        ended_rows_rn=pooled(running.ended_rows_rn, texts[1]),
        lengths_pw=ops.take_along(ops.concat([running.lengths_pw, length_pw]), place_pw),
        open_p1=running.open_p1 & better_p1,
    )


def continues(ops: ArrayOps, config: BeamConfig, running: BeamState, ends_pk: Array) -> Array:
    """Whether the search does, after a step whose candidates ended like that; one truth value."""
    done = _every(ops, ends_pk) | ~_any(ops, running.open_p1)
    return ~(done | _every(ops, _full(ops, running.ended_pw))) if config.early else ~done


def _full(ops: ArrayOps, ended_pw: Array) -> Array:
    """Whether as many texts have ended as are searched for, (p, 1)."""
    return ops.sum(ended_pw > NEVER) >= ended_pw.shape[1]


def _every(ops: ArrayOps, x_pk: Array) -> Array:
    return ops.all(ops.all(x_pk))


def _any(ops: ArrayOps, x_pk: Array) -> Array:
    return ~_every(ops, ~x_pk)


def best(running: BeamState, count: int) -> list[Beam]:
    """The best `count` texts of each prompt, from arrays on the host; empty ones where nothing possible was met."""
    found: list[Beam] = []
    prompts, beams = running.ended_pw.shape
    for prompt in range(prompts):
        for place in range(count):
            score, length = float(running.ended_pw[prompt, place]), int(running.lengths_pw[prompt, place])
            row = prompt * beams + place
            tokens = tuple(running.ended_tokens_rn[row, :length].tolist())
            rows = tuple(running.ended_rows_rn[row, :length].tolist())
            found.append(Beam(HOPELESS) if score == NEVER else Beam(score, tokens, rows))
    return found
