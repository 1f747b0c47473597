"""Vectors of texts on PyTorch, compared with those that sentence-transformers gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import embedding_models as cases
import numpy as np
import pytest
import torch

from monoblock import CrossEncoder, SentenceTransformer
from monoblock.embeddings import Dense, LayerNorm, Normalize, Pooling, Transformer

ATOL = 1e-6  # of vectors of length 1, float32; measured: 5e-7
SCORES = 3e-6  # of logits, which are differences of larger numbers; measured: 1.8e-6
RECORDED = np.load(cases.RECORDED)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("embedding-models")
    return {family: cases.write(root / family, family) for family in cases.FAMILIES}


def module(kind: str, *arguments: Any) -> Any:
    if kind == "Dense":
        return Dense(cases.WIDTH, cases.OUT, True, arguments[0], *cases.dense_weights())
    if kind == "LayerNorm":
        made = LayerNorm(cases.WIDTH)
        made.weight, made.bias = cases.norm_weights()
        return made
    return Normalize()


def built(folders: dict[str, Path], case: cases.Case, **options: Any) -> SentenceTransformer:
    modules = [
        Transformer(folders[case["family"]]),
        Pooling(cases.WIDTH, case["mode"], case["include_prompt"]),
        *(module(*one) for one in case["after"]),
    ]
    return SentenceTransformer(modules=modules, prompts=cases.PROMPTS, device="cpu", **options)


def assert_close(found: Any, expected: np.ndarray, atol: float = ATOL) -> None:
    """Equal within `atol`, relative to the length of each vector, as far as it is more than 1."""
    assert found.dtype == np.float32 and found.shape == expected.shape
    length = np.maximum(np.sqrt(np.square(expected).sum(-1, keepdims=True)), 1)
    np.testing.assert_allclose(found / length, expected / length, rtol=0, atol=atol)


@pytest.mark.parametrize("name", cases.CASES)
def test_recorded(folders: dict[str, Path], name: str) -> None:
    case = cases.CASES[name]
    found = built(folders, case).encode(cases.TEXTS, batch_size=3, **case["encode"])
    assert_close(found, RECORDED[f"encode/{name}"])


@pytest.mark.parametrize("name", cases.SCORES)
def test_recorded_scores(tmp_path: Path, name: str) -> None:
    family, labels, options = cases.SCORES[name]
    folder = cases.write(tmp_path / "model", family, "ForSequenceClassification", num_labels=labels)
    found = CrossEncoder(folder, device="cpu").predict(cases.PAIRS, batch_size=2, **options)
    expected = RECORDED[f"predict/{name}"]
    assert_close(found.reshape(len(cases.PAIRS), -1), expected.reshape(len(cases.PAIRS), -1), SCORES)
