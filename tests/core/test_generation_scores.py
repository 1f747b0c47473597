"""Logits processors: sampled distributions compared with NumPy definitions, and exact cases."""

import numpy as np
import pytest
from fakes import constant

from monoblock.generation import scores as sc
from monoblock.generation.arrays import NumpyOps

OPS = NumpyOps()
DRAWS = 4000
P = np.array([0.30, 0.22, 0.15, 0.11, 0.08, 0.06, 0.04, 0.025, 0.01, 0.005])
ORDER = np.random.default_rng(1).permutation(len(P))  # unsorted, as real scores
SCORES = np.log(P)[ORDER]


def normalised(weights):
    return weights / weights.sum()


def keep(kept):
    """The distribution restricted to the entries of the sorted probabilities with `kept` true."""
    return normalised(np.where(kept, P, 0.0))[ORDER]


def typical(mass):
    surprise = -np.log(P)
    order = np.argsort(np.abs(surprise - (P * surprise).sum()))
    count = int((np.cumsum(P[order]) < mass).sum()) + 1
    return keep(np.isin(np.arange(len(P)), order[:count]))


ENTROPY = -(P * np.log(P)).sum()
CASES = [
    ({}, P[ORDER]),
    ({"temperature": 0.5}, normalised(P**2)[ORDER]),
    ({"temperature": 4.0}, normalised(P**0.25)[ORDER]),
    ({"top_k": 3}, keep(np.arange(10) < 3)),
    ({"top_p": 0.6}, keep(np.arange(10) < 3)),  # .30 + .22 + .15
    ({"min_p": 0.2}, keep(P >= 0.2 * 0.30)),
    ({"typical_p": 0.5}, typical(0.5)),
    ({"epsilon_cutoff": 0.05}, keep(P >= 0.05)),
    ({"eta_cutoff": 0.09}, keep(min(0.09, 0.3 * np.exp(-ENTROPY)) <= P)),
    ({"top_h": 0.5}, keep(np.cumsum(-P * np.log(P)) <= 0.5 * ENTROPY)),
    ({"suppress_tokens": [int(ORDER.argmin())]}, keep(np.arange(10) > 0)),
    (
        {"sequence_bias": [[[int(ORDER.argmin())], -1.0]]},
        normalised(P * np.exp(-1.0 * (np.arange(10) == 0)))[ORDER],
    ),
    (
        {"temperature": 2.0, "top_k": 4, "min_p": 0.7},
        normalised(np.where(np.arange(10) < 3, P**0.5, 0))[ORDER],
    ),
]


@pytest.mark.parametrize(("fields", "expected"), CASES, ids=[str(case[0]) for case in CASES])
def test_samples_follow_the_distribution(fields, expected):
    options = {"top_k": 0, "do_sample": True, "seed": 11, "max_new_tokens": 1, **fields}
    drawn = constant(SCORES).generate([[0]], num_return_sequences=DRAWS, **options)[:, 1]
    counts = np.bincount(drawn, minlength=len(P))
    assert counts[expected == 0].sum() == 0
    wanted = expected[expected > 0] * DRAWS
    chi2 = ((counts[expected > 0] - wanted) ** 2 / wanted).sum()
    # The 99.9% quantile for 9 degrees of freedom; with fewer the bound is looser. The seed is fixed.
    assert chi2 < 27.9


def test_greedy_search_ignores_sampling_parameters():
    out = constant(SCORES).generate([[0]], max_new_tokens=1, top_k=2, temperature=9.0)
    assert out[0, 1] == ORDER.argmin()


# ---------------------------------------------------------------------- top_p with and without a full sort


@pytest.mark.parametrize("spread", [0.0, 0.05, 1.0, 8.0])
@pytest.mark.parametrize("p", [0.0, 0.2, 0.9, 0.999])
def test_top_p_of_a_partial_sort_equals_a_full_sort(monkeypatch, spread, p):
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(4, 2000)) * spread + rng.normal(size=(4, 2000)) * 1e-3).astype(np.float32)
    partial = sc.top_p(OPS, x, p)
    monkeypatch.setattr(sc, "WINDOW", 10_000)
    np.testing.assert_array_equal(partial, sc.top_p(OPS, x, p))


def test_top_k_keeps_ties_with_the_kth_score():
    x = np.array([[1.0, 3.0, 3.0, 3.0, 2.0]])
    assert (sc.top_k(OPS, x, 2) > -np.inf).tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize(
    "function", [sc.top_k, sc.top_p, sc.min_p, sc.typical_p, sc.epsilon_cutoff, sc.eta_cutoff]
)
def test_keep_retains_the_highest_scores(function):
    x = np.log(np.array([[0.9, 0.06, 0.03, 0.01]]))
    strict = {sc.top_k: 1, sc.min_p: 1.0}.get(function, 0.5 if function is not sc.top_p else 0.1)
    assert (function(OPS, x, strict, keep=3) > -np.inf).sum() >= 3


# ---------------------------------------------------------------------- repetition, n-grams, biases


def test_repetition_penalty_divides_positive_and_multiplies_negative_scores():
    x = np.array([[2.0, -2.0, 2.0, -2.0]])
    ids = np.array([[0, 1, 0, 9]])  # 9 is outside the vocabulary, like an image token
    assert sc.repetition_penalty(OPS, x, ids, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]
    padding = np.array([[False, True, True, True]])
    assert sc.repetition_penalty(OPS, x, ids[:, [2, 1, 1, 1]], 2.0, padding).tolist() == [
        [2.0, -4.0, 2.0, -2.0]
    ]


def banned(ids, size, vocab=10, valid=None):
    ids = np.array([ids])
    out = sc.ban_ngrams(
        OPS, np.zeros((1, vocab)), ids, size, ids, None if valid is None else np.array([valid])
    )
    return np.flatnonzero(out[0] == -np.inf).tolist()


def test_repeated_ngrams_are_banned():
    assert banned([1, 2, 3, 1, 2], 3) == [3]
    assert banned([1, 2, 1, 3, 1], 2) == [2, 3]
    assert banned([1, 2, 3], 1) == [1, 2, 3]
    assert banned([1, 2], 3) == []
    assert banned([1, 2, 3, 4], 2) == []
    assert banned([4, 4, 5, 6, 4], 2, valid=[False, True, True, True, True]) == [5]


def test_ngrams_of_another_source_are_banned():
    source = np.array([[7, 8, 9]])
    out = sc.ban_ngrams(OPS, np.zeros((1, 10)), np.array([[1, 7, 8]]), 3, source)
    assert np.flatnonzero(out[0] == -np.inf).tolist() == [9]


def test_sequence_biases_with_a_matching_prefix_are_added():
    bias = sc.SequenceBias(OPS, {(3,): 1.0, (1, 3): 10.0, (2, 3): 100.0, (0, 1, 3): 1000.0, (1, 4): -np.inf})
    scores = np.zeros((3, 5))
    out = bias(np.array([[0, 1], [0, 2], [4, 4]]), scores)
    assert out[:, 3].tolist() == [1011.0, 101.0, 1.0]
    assert out[:, 4].tolist() == [-np.inf, 0.0, 0.0]
    assert bias(np.array([[1]]), np.zeros((1, 5)))[0, 3] == 11.0  # the longest prefix does not fit yet
    assert not scores.any()


def test_bad_words_ignore_eos_but_not_words_that_end_with_eos():
    options = {"max_new_tokens": 3, "eos_token_id": 1, "pad_token_id": 0}
    out = constant([0.0, 5.0, 1.0]).generate([[0]], bad_words_ids=[[1]], **options)
    assert out.tolist() == [[0, 1]]
    out = constant([0.0, 5.0, 1.0]).generate([[0]], bad_words_ids=[[0, 1]], **options)
    assert out.tolist() == [[0, 2, 1]]


def test_forced_and_begin_suppressed_tokens():
    out = constant([0.0, 5.0, 1.0, 0.5]).generate(
        [[0]], max_new_tokens=4, forced_eos_token_id=3, forced_bos_token_id=2
    )
    assert out.tolist() == [[0, 2, 1, 1, 3]]
    out = constant([0.0, 5.0, 1.0]).generate([[0, 0]], max_new_tokens=2, begin_suppress_tokens=[1])
    assert out.tolist() == [[0, 0, 2, 1]]


def test_exponential_decay_length_penalty_raises_eos():
    options = {"max_new_tokens": 20, "eos_token_id": 1, "exponential_decay_length_penalty": (2, 2.0)}
    # The score of eos is 1, 1, 1, then 2, 4, 8 after 3, 4, 5 tokens; the other token has 5.5.
    assert constant([5.5, 1.0]).generate([[0]], **options).tolist() == [[0] * 6 + [1]]


def test_invalid_scores_become_finite():
    x = np.array([[np.nan, np.inf, -np.inf, 1.0]], dtype=np.float32)
    assert sc.remove_invalid(OPS, x).tolist() == [[0.0, sc.FLOAT32_MAX, -sc.FLOAT32_MAX, 1.0]]
