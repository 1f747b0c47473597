"""Beam search inside a compiled program: the algorithm of `beams.py` on arrays of fixed shapes.

Shape suffixes: p prompts, w beams, k candidates, n capacity in new tokens; r rows, which are p * w.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from monoblock.generation.arrays import Array, ArrayOps
from monoblock.generation.beams import HOPELESS, Beam, BeamScorer
from monoblock.generation.scores import NEVER


@dataclass(frozen=True)
class BeamConfig:
    """The static arguments of a beam search.

    `early`: a prompt is done as soon as `beams` hypotheses are finished. `far`: it is done only when no length could
    improve on them.
    """

    beams: int
    candidates: int
    early: bool
    far: bool

    @classmethod
    def of(cls, scorer: BeamScorer, eos: int) -> BeamConfig:
        """The static arguments for `eos` eos tokens."""
        return cls(
            beams=scorer.width,
            candidates=max(2, 1 + eos) * scorer.width,
            early=scorer.early_stopping is True,
            far=scorer.early_stopping == "never" and scorer.length_penalty > 0,
        )


def norms(scorer: BeamScorer, room: int) -> np.ndarray[Any, Any]:
    """Divisors of the scores of hypotheses of 1, 2, ... `room` new tokens, and last of those of the maximum length."""
    return np.array([scorer.norm(n) for n in (*range(1, room + 1), scorer.longest)], np.float32)


class BeamState(NamedTuple):
    """The running beams, the best finished hypotheses (score -inf: free slot), and whether each prompt is open.

    `tokens` hold the new tokens of each beam, `rows` the row of the batch that each was chosen from.
    """

    scores_pw: Array
    tokens_rn: Array
    rows_rn: Array
    ended_pw: Array
    ended_tokens_rn: Array
    ended_rows_rn: Array
    lengths_pw: Array
    open_p1: Array


class Candidates(NamedTuple):
    """The likeliest continuations of each prompt: score, parent beam, token, and whether it finishes."""

    scores_pk: Array
    parents_pk: Array
    tokens_pk: Array
    ends_pk: Array


def initial_beams(prompts: int, config: BeamConfig, room: int) -> BeamState:
    """The state before the first step, on the host: all beams equal the prompt, so only the first one competes."""
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
    ops: ArrayOps, config: BeamConfig, state: BeamState, candidates: Candidates, step: Array, norms_n: Array
) -> BeamState:
    """The state after one more token. `step`: new tokens so far; `norms_n`: see `norms`."""
    (prompts, count), beams = candidates.scores_pk.shape, config.beams
    room = state.tokens_rn.shape[1]
    prompt_p1 = np.arange(prompts, dtype=np.int32)[:, None]
    at_step_1n = np.arange(room, dtype=np.int32)[None] == step
    norm_1 = ops.take_rows(norms_n, ops.reshape(step, (1,)))
    # All candidates as sequences, one per row.
    parent_k = ops.reshape(prompt_p1 * beams + candidates.parents_pk, (prompts * count,))
    token_k1 = ops.reshape(candidates.tokens_pk, (prompts * count, 1))
    sequences = tuple(
        ops.where(at_step_1n, new_k1, ops.take_rows(old_rn, parent_k))
        for new_k1, old_rn in ((token_k1, state.tokens_rn), (parent_k[:, None], state.rows_rn))
    )
    # Finished candidates among the first `beams` compete with the hypotheses finished before.
    first_pw, ends_pw = candidates.scores_pk[:, :beams], candidates.ends_pk[:, :beams]
    accepts_p1 = state.open_p1 & ~_full(ops, state.ended_pw) if config.early else state.open_p1
    joins_pw = ends_pw & (first_pw > HOPELESS / 2) & accepts_p1
    joining_pw = ops.where(joins_pw, first_pw / norm_1, NEVER)
    ended_pw, slot_pw = ops.top_k(ops.concat([state.ended_pw, joining_pw]), beams)
    slot_r = ops.reshape(prompt_p1 * (2 * beams) + slot_pw, (prompts * beams,))

    def merged(old_rn: Array, new_kn: Array) -> Array:
        old = ops.reshape(old_rn, (prompts, beams, room))
        both = ops.concat([old, ops.reshape(new_kn, (prompts, count, room))[:, :beams]])
        return ops.take_rows(ops.reshape(both, (prompts * 2 * beams, room)), slot_r)

    length_pw = state.lengths_pw * 0 + step + 1
    # The best unfinished candidates become the running beams.
    running_pk = ops.where(
        candidates.ends_pk, candidates.scores_pk + np.float32(HOPELESS), candidates.scores_pk
    )
    scores_pw, running_pw = ops.top_k(running_pk, beams)
    running_r = ops.reshape(prompt_p1 * count + running_pw, (prompts * beams,))
    reach_p1 = scores_pw[:, :1] / (norms_n[-1:] if config.far else norm_1)
    better_p1 = ~_full(ops, ended_pw) | (reach_p1 > ended_pw[:, -1:])
    return BeamState(
        scores_pw=scores_pw,
        tokens_rn=ops.take_rows(sequences[0], running_r),
        rows_rn=ops.take_rows(sequences[1], running_r),
        ended_pw=ended_pw,
        ended_tokens_rn=merged(state.ended_tokens_rn, sequences[0]),
        ended_rows_rn=merged(state.ended_rows_rn, sequences[1]),
        lengths_pw=ops.take_along(ops.concat([state.lengths_pw, length_pw]), slot_pw),
        open_p1=state.open_p1 & better_p1,
    )


def continues(ops: ArrayOps, config: BeamConfig, state: BeamState, ends_pk: Array) -> Array:
    """Whether the search continues after a step whose candidates finished as `ends_pk`; a scalar boolean."""
    done = _every(ops, ends_pk) | ~_any(ops, state.open_p1)
    return ~(done | _every(ops, _full(ops, state.ended_pw))) if config.early else ~done


def _full(ops: ArrayOps, ended_pw: Array) -> Array:
    """Whether `beams` hypotheses have finished, (p, 1)."""
    return ops.sum(ended_pw > NEVER) >= ended_pw.shape[1]


def _every(ops: ArrayOps, x_pk: Array) -> Array:
    return ops.all(ops.all(x_pk))


def _any(ops: ArrayOps, x_pk: Array) -> Array:
    return ~_every(ops, ~x_pk)


def best(state: BeamState, count: int) -> list[Beam]:
    """The best `count` hypotheses of each prompt, from host arrays; empty ones where no hypothesis is possible."""
    hypotheses: list[Beam] = []
    prompts, beams = state.ended_pw.shape
    for prompt in range(prompts):
        for slot in range(count):
            score, length = float(state.ended_pw[prompt, slot]), int(state.lengths_pw[prompt, slot])
            row = prompt * beams + slot
            tokens = tuple(state.ended_tokens_rn[row, :length].tolist())
            rows = tuple(state.ended_rows_rn[row, :length].tolist())
            hypotheses.append(Beam(HOPELESS) if score == NEVER else Beam(score, tokens, rows))
    return hypotheses
