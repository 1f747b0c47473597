"""Pooling and the modules after it, in NumPy: a text's vector has the same bits in every batch and with any padding."""

from __future__ import annotations

from typing import Any

import embedding_models as cases
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monoblock.embeddings import Dense, LayerNorm, Normalize, Pooling
from monoblock.embeddings.arrays import HOST
from monoblock.embeddings.pooling import POOLS, pooled

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def states(lengths: list[int], width: int, seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [
        (random.standard_normal((n, width)) * 10.0 ** random.integers(-3, 4)).astype(np.float32)
        for n in lengths
    ]


def padded(rows: list[np.ndarray], more: int, left: bool, fill: float) -> tuple[np.ndarray, np.ndarray]:
    """The rows in one array, with `more` masked tokens than the longest needs."""
    longest = max(map(len, rows)) + more
    array = np.full((len(rows), longest, rows[0].shape[1]), fill, np.float32)
    mask = np.zeros((len(rows), longest), np.int64)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if left else slice(len(row))
        array[i, where], mask[i, where] = row, 1
    return array, mask


@pytest.mark.parametrize("width", [1, 2, 7, 64])
@pytest.mark.parametrize("mode", POOLS)
@given(
    lengths=LENGTHS,
    more=st.integers(0, 20),
    left=st.booleans(),
    fill=st.sampled_from([0.0, 1e30, float("nan")]),
    skipped=st.integers(0, 3),
    seed=st.integers(0, 2**16),
)
def test_pooling_is_independent_of_the_batch(
    mode: str, width: int, lengths: list[int], more: int, left: bool, fill: float, skipped: int, seed: int
) -> None:
    rows = states(lengths, width, seed)
    array, mask = padded(rows, more, left, fill)
    together = pooled(HOST, (mode,), array, mask, skipped)
    for i, row in enumerate(rows):
        alone = pooled(HOST, (mode,), row[None], np.ones((1, len(row)), np.int64), skipped)
        assert together[i].tobytes() == alone[0].tobytes()


@pytest.mark.parametrize("width", [1, 3, 64, 200])
@given(count=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_modules_are_independent_of_the_batch(width: int, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    x = random.standard_normal((count, width)).astype(np.float32)
    for module in (
        Dense(width, 5),
        LayerNorm(width),
        Normalize(),
        Dense(width, 1, activation_function="GELU"),
    ):
        together = module({"sentence_embedding": x})["sentence_embedding"]
        for i in range(count):
            alone = module({"sentence_embedding": x[i : i + 1].copy()})["sentence_embedding"]
            assert together[i].tobytes() == alone[0].tobytes()


def test_formulas() -> None:
    """Of three tokens, with the second masked by a prompt of one token: [1, 10], [2, 20], [3, 30]."""
    x = np.array([[[1, 10], [2, 20], [3, 30], [9, 9]]], np.float32)
    mask = np.array([[1, 1, 1, 0]])
    expected: dict[str, Any] = {
        "cls": [1, 10],
        "max": [3, 30],
        "mean": [2, 20],
        "mean_sqrt_len_tokens": [6 / 3**0.5, 60 / 3**0.5],
        "weightedmean": [14 / 6, 140 / 6],
        "lasttoken": [3, 30],
    }
    after: dict[str, Any] = {
        "cls": [2, 20],
        "max": [3, 30],
        "mean": [2.5, 25],
        "mean_sqrt_len_tokens": [5 / 2**0.5, 50 / 2**0.5],
        "weightedmean": [13 / 5, 130 / 5],
        "lasttoken": [3, 30],
    }
    for mode in POOLS:
        np.testing.assert_allclose(pooled(HOST, (mode,), x, mask)[0], expected[mode], rtol=1e-6)
        np.testing.assert_allclose(pooled(HOST, (mode,), x, mask, 1)[0], after[mode], rtol=1e-6)
    both = pooled(HOST, ("lasttoken", "cls"), x, mask)[0]
    assert both.tolist() == [3, 30, 1, 10]


@pytest.mark.parametrize("mode", POOLS)
def test_without_tokens_the_vector_is_zero(mode: str) -> None:
    """Also where all tokens are those of a prompt."""
    empty = pooled(HOST, (mode,), np.zeros((2, 3, 4), np.float32), np.zeros((2, 3), np.int64))
    assert empty.tolist() == np.zeros((2, 4)).tolist()
    prompt = pooled(HOST, (mode,), np.ones((2, 3, 4), np.float32), np.ones((2, 3), np.int64), 3)
    assert prompt.tolist() == np.zeros((2, 4)).tolist()


def test_arguments_of_pooling() -> None:
    assert Pooling(4, pooling_mode=["mean"]).pooling_mode == "mean"
    assert Pooling(4, ("max", "cls")).get_embedding_dimension() == 8
    old = Pooling(word_embedding_dimension=4, pooling_mode_max_tokens=True, pooling_mode_cls_token=True)
    assert old.pooling_mode == ("cls", "max") and old.get_pooling_mode_str() == "cls+max"
    with pytest.raises(ValueError, match="pooling_mode='median': expected one of 'cls'"):
        Pooling(4, "median")
    with pytest.raises(ValueError, match="embedding_dimension=None"):
        Pooling(pooling_mode="mean")
    with pytest.raises(TypeError, match="no argument 'pooling_mode_first'"):
        Pooling(4, pooling_mode_first=True)
    with pytest.raises(ValueError, match="activation_function='Softmax': expected one of Identity"):
        Dense(4, 3, activation_function="Softmax")
    with pytest.raises(ValueError, match=r"init_weight has the shape \[2, 2\]; expected \[3, 4\]"):
        Dense(4, 3, init_weight=np.zeros((2, 2)))


def test_the_recorded_version() -> None:
    """Recorded values are those of the version that docs/embeddings.md names."""
    assert str(np.load(cases.RECORDED)["version"]).startswith("6.")
