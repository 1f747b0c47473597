"""`monoblock.util` on NumPy arrays and tensors, compared with what sentence-transformers gave."""

from __future__ import annotations

from typing import Any

import embedding_models as cases
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from monoblock import util
from monoblock.embeddings import quantization, similarity
from monoblock.pipelines.frameworks import Framework

RECORDED = np.load(cases.RECORDED)
MANY, FEW = cases.vectors(150, 1), cases.vectors(20, 2)
NAMES = [name.partition("/")[2] for name in RECORDED if name.startswith("similarity/")]


@pytest.fixture(params=["tensor", "numpy", "list", "without PyTorch"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes a kind of input of a NumPy array."""
    if request.param == "without PyTorch":
        monkeypatch.setattr(Framework, "missing", lambda self: "torch")
    return {"tensor": torch.from_numpy, "list": lambda array: [row.tolist() for row in array]}.get(
        request.param, lambda array: array
    )


@pytest.mark.parametrize("name", NAMES)
def test_similarities(name: str, make: Any) -> None:
    found = getattr(util, name)(make(FEW), make(MANY[:20]))
    assert isinstance(found, torch.Tensor) == (Framework.missing.__name__ == "missing")
    # cdist of large matrices is a matrix product, whose rounding errors are relative to the squared lengths
    np.testing.assert_allclose(np.asarray(found), RECORDED[f"similarity/{name}"], rtol=1e-5, atol=2e-5)


def test_results_are_those_of_the_inputs() -> None:
    """One vector counts as several; a tensor and an array may be mixed."""
    assert util.cos_sim(FEW[0], MANY).shape == (1, 150)
    assert util.cos_sim(torch.from_numpy(FEW[0]), MANY).shape == (1, 150)
    assert util.pairwise_dot_score(FEW[0], FEW[1]).shape == ()
    assert util.cos_sim([torch.from_numpy(row) for row in FEW], list(MANY)).shape == (20, 150)
    assert util.pytorch_cos_sim is util.cos_sim
    gradient = torch.from_numpy(FEW).requires_grad_()
    util.cos_sim(gradient, MANY).sum().backward()
    assert gradient.grad is not None
    lengths = np.linalg.norm(np.asarray(util.normalize_embeddings(FEW)), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)
    assert (
        util.truncate_embeddings(FEW, 5).shape == (20, 5) and util.truncate_embeddings(FEW, None) is not None
    )


def test_search(make: Any) -> None:
    found = util.semantic_search(make(FEW), make(MANY), query_chunk_size=6, corpus_chunk_size=40, top_k=5)
    assert [[hit["corpus_id"] for hit in row] for row in found] == RECORDED["search/ids"].tolist()
    scores = np.array([[hit["score"] for hit in row] for row in found])
    np.testing.assert_allclose(scores, RECORDED["search/scores"], rtol=1e-6)
    assert util.semantic_search(make(FEW[:1]), make(MANY), top_k=200)[0][-1].keys() == {"corpus_id", "score"}


def test_search_with_equal_scores() -> None:
    """The first texts come first; with chunks the result is the same."""
    corpus = np.repeat(FEW[:2], 6, axis=0)
    for chunk in (3, 100):
        [found] = util.semantic_search(FEW[0], corpus, corpus_chunk_size=chunk, top_k=6)
        assert [hit["corpus_id"] for hit in found] == [0, 1, 2, 3, 4, 5]
    by_distance = util.semantic_search(FEW[:1], MANY, score_function=util.euclidean_sim, top_k=3)[0]
    assert [hit["corpus_id"] for hit in by_distance] == np.argsort(((FEW[0] - MANY) ** 2).sum(1))[:3].tolist()


@pytest.mark.parametrize(
    ("name", "options"), [("all", {}), ("limited", {"max_pairs": 100, "top_k": 4, "query_chunk_size": 30})]
)
def test_pairs(name: str, options: dict[str, int], make: Any) -> None:
    found = util.paraphrase_mining_embeddings(make(MANY), **options)
    expected = RECORDED[f"pairs/{name}"]
    assert len(found) == len(expected)
    np.testing.assert_allclose([pair[0] for pair in found], expected[:, 0], rtol=1e-5, atol=1e-6)
    order = [(i, j) for _, i, j in found]
    assert all(i < j for i, j in order)
    assert set(order) == {(int(i), int(j)) for _, i, j in expected}


def test_paraphrase_mining() -> None:
    class Encoder:
        def encode(self, sentences: list[str], **options: Any) -> Any:
            assert options["prompt_name"] == "query" and options["batch_size"] == 4
            return torch.from_numpy(cases.vectors(len(sentences), 1))

    found = util.paraphrase_mining(Encoder(), ["a"] * 150, batch_size=4, prompt_name="query")
    assert len(found) == len(RECORDED["pairs/all"])


def test_communities(make: Any) -> None:
    found = util.community_detection(make(MANY), threshold=0.8, min_community_size=4, batch_size=64)
    assert [index for cluster in found for index in [*cluster, -1]] == RECORDED["communities"].tolist()


def test_few_texts_are_no_community() -> None:
    assert util.community_detection(MANY[:9]) == util.community_detection(np.zeros((0, 4), np.float32)) == []


@given(batch=st.integers(1, 200), least=st.integers(1, 12), threshold=st.floats(0.2, 0.99))
def test_communities_do_not_overlap(batch: int, least: int, threshold: float) -> None:
    found = util.community_detection(MANY, threshold, least, batch)
    members = [index for cluster in found for index in cluster]
    assert len(members) == len(set(members))
    assert [len(cluster) for cluster in found] == sorted(map(len, found), reverse=True)
    assert all(len(cluster) >= least for cluster in found)


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_quantization(precision: str, make: Any) -> None:
    found = util.quantize_embeddings(make(MANY), precision)
    expected = RECORDED[f"quantize/{precision}"]
    assert found.dtype == expected.dtype
    if isinstance(make(MANY), list) and "int8" in precision:
        # Lists of Python floats are float64 in NumPy, where a value at the edge of a step may get the next code.
        assert abs(found.astype(int) - expected).max() <= 1 and (found != expected).mean() < 0.01
    else:
        np.testing.assert_array_equal(found, expected)


def test_calibration(caplog: pytest.LogCaptureFixture) -> None:
    expected = RECORDED["quantize/calibrated"]
    np.testing.assert_array_equal(
        util.quantize_embeddings(FEW, "int8", calibration_embeddings=MANY), expected
    )
    ranges = np.stack([MANY.min(0), MANY.max(0)])
    np.testing.assert_array_equal(util.quantize_embeddings(FEW, "int8", ranges), expected)
    assert not caplog.records
    util.quantize_embeddings(FEW, "int8")
    assert "the ranges of each channel are those of 20 embeddings" in caplog.text
    assert util.quantize_embeddings(FEW.astype(np.float64), "float32").dtype == np.float32
    assert quantization.quantize_embeddings is util.quantize_embeddings


def test_refused() -> None:
    with pytest.raises(ValueError, match="precision='int4': expected one of 'float32', 'int8'"):
        util.quantize_embeddings(FEW, "int4")
    for integers in (np.ones((2, 3), np.int8), torch.ones(2, 3, dtype=torch.int8)):
        with pytest.raises(ValueError, match="embeddings are int8; expected floating-point"):
            util.quantize_embeddings(integers, "binary")
    with pytest.raises(ValueError, match="uint8: one embedding has no range of values"):
        util.quantize_embeddings(FEW[:1], "uint8")
    with pytest.raises(ValueError, match=r"embeddings of the shapes \[20, 16\] and \[2, 3\]"):
        util.cos_sim(FEW, np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match="expected equal ones"):
        util.pairwise_cos_sim(FEW, MANY)
    for options, message in (
        ({"top_k": 0}, "top_k=0"),
        ({"query_chunk_size": 1.5}, "query_chunk_size=1.5"),
        ({"corpus_chunk_size": True}, "corpus_chunk_size=True"),
    ):
        with pytest.raises(ValueError, match=message):
            util.semantic_search(FEW, MANY, **options)
    with pytest.raises(ValueError, match=r"corpus_embeddings has the shape \[1, 20, 16\]"):
        util.semantic_search(FEW, FEW[None])
    with pytest.raises(ValueError, match="expected one of 'cosine'"):
        similarity.similarity_name("angle")
