"""Beam search on arrays, for compiled programs, compared step by step with the search in Python."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from monoblock.generation import beam_program
from monoblock.generation.arrays import NumpyOps
from monoblock.generation.beams import HOPELESS, Beam, BeamScorer, BeamSearch

OPS = NumpyOps()
PROMPTS, VOCAB, ROOM = 3, 7, 9
RULES = [
    BeamScorer(width, penalty, early, ROOM)
    for width in (2, 3)
    for penalty in (1.0, 0.0, -2.0, 1.5)
    for early in (False, True, "never")
]


def candidates(running, rng, width, last):
    """The best continuations of each prompt from random scores, some of them -inf."""
    logs = rng.normal(size=(PROMPTS, width.beams, VOCAB)).astype(np.float32) - 2
    logs[rng.random(logs.shape) < 0.2] = -np.inf
    total = (running.scores_pw[..., None] + logs).reshape(PROMPTS, -1)
    scores, index = OPS.top_k(total, min(width.candidates, total.shape[1]))
    tokens = index % VOCAB
    return beam_program.Candidates(scores, index // VOCAB, tokens, (tokens < 2) | last)


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_same_beams_as_the_python_search(rules):
    width = beam_program.BeamConfig.of(rules, eos=2)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        searches = [BeamSearch(rules, prompt * rules.width) for prompt in range(PROMPTS)]
        running = beam_program.initial_beams(PROMPTS, width, ROOM)
        norms = beam_program.norms(rules, ROOM)
        for step in range(ROOM):
            found = candidates(running, rng, width, step == ROOM - 1)
            for prompt, search in enumerate(searches):
                scores, ends = found.scores_pk[prompt], found.ends_pk[prompt]
                search.advance(
                    scores, found.parents_pk[prompt].tolist(), found.tokens_pk[prompt].tolist(), ends
                )
            running = beam_program.advance(OPS, width, running, found, np.array(step), norms)
            beams = [beam for search in searches for beam in search.running]
            assert_array_equal(running.scores_pw.reshape(-1), np.float32([beam.score for beam in beams]))
            assert_array_equal(running.tokens_rn[:, : step + 1], [beam.tokens for beam in beams])
            assert_array_equal(running.rows_rn[:, : step + 1], [beam.rows for beam in beams])
            assert running.open_p1[:, 0].tolist() == [search.open for search in searches]
            enough = rules.early_stopping is True and all(search.full for search in searches)
            stops = found.ends_pk.all() or enough or not any(search.open for search in searches)
            assert bool(beam_program.continues(OPS, width, running, found.ends_pk)) == (not stops)
            if stops:
                break
        expected = [beam for search in searches for beam in search.best(rules.width)]
        for ours, theirs in zip(beam_program.best(running, rules.width), expected, strict=True):
            assert (ours.tokens, ours.rows) == (theirs.tokens, theirs.rows)
            assert ours.score == np.float32(theirs.score)


def test_beams_without_possible_tokens_are_empty():
    width = beam_program.BeamConfig.of(RULES[0], eos=1)
    assert beam_program.best(beam_program.initial_beams(2, width, ROOM), 2) == [Beam(HOPELESS)] * 4
