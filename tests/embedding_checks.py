"""Checks of embeddings for JAX and TensorFlow: both load the same folders as PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import embedding_models as cases
import numpy as np

from monoblock import CrossEncoder, SentenceTransformer
from monoblock.embeddings import Dense, LayerNorm, Normalize, Pooling, Transformer

ATOL = 1e-6  # of vectors of length 1, float32; measured: 5e-7
# Of logits, which are differences of larger numbers: `measure.rounding` of these models is 1.5e-5 (MPNet) to 3.1e-5
# (GPT Neo), from their layers, widths and largest hidden states; measured: 3.8e-6, with AVX-512.
SCORES = 1.5e-5
RECORDED = np.load(cases.RECORDED)


def near(found: Any, expected: Any, atol: float = ATOL) -> None:
    """Float32 and equal within `atol`, relative to the length of each vector, as far as it is more than 1."""
    assert found.dtype == np.float32 and found.shape == expected.shape
    length = np.maximum(np.sqrt(np.square(expected).sum(-1, keepdims=True)), 1)
    np.testing.assert_allclose(found / length, expected / length, rtol=0, atol=atol)


def module(kind: str, *arguments: Any) -> Any:
    """A module after pooling with the tests' weights."""
    if kind == "Dense":
        return Dense(cases.WIDTH, cases.OUT, True, arguments[0], *cases.dense_weights())
    if kind == "LayerNorm":
        made = LayerNorm(cases.WIDTH)
        made.weight, made.bias = cases.norm_weights()
        return made
    return Normalize()


def built(folder: Path, case: cases.Case, framework: str, **options: Any) -> SentenceTransformer:
    """The model of a case."""
    modules = [
        Transformer(folder, framework=framework),
        Pooling(cases.WIDTH, case["mode"], case["include_prompt"]),
        *(module(*one) for one in case["after"]),
    ]
    return SentenceTransformer(modules=modules, prompts=cases.PROMPTS, **options)


def check_family(tmp_path: Path, family: str, framework: str) -> None:
    """All ways of pooling; folders without modules.json; features of `forward`."""
    folder = cases.write(tmp_path / "model", family)
    model = built(folder, cases.CASES[f"{family}-mean"], framework)
    for mode in cases.MODES:
        model.modules[1] = Pooling(cases.WIDTH, mode)
        near(model.encode(cases.TEXTS, batch_size=4), RECORDED[f"encode/{family}-{mode}"])
    again = SentenceTransformer(folder, framework=framework)
    mean = "lasttoken" if again[1].pooling_mode == "lasttoken" else "mean"
    near(again.encode(cases.TEXTS), RECORDED[f"encode/{family}-{mean}"])
    features = again(again.tokenize(cases.TEXTS[:3]))
    near(features["sentence_embedding"], RECORDED[f"encode/{family}-{mean}"][:3])


def check_modules(tmp_path: Path, framework: str) -> None:
    """The modules after pooling, prompts, saving, and folders of PyTorch."""
    source = cases.write(tmp_path / "model", "MPNet")
    for name in ("dense-normalize", "layer-norm", "without-prompt-mean", "two-modes", "truncate-normalize"):
        case = cases.CASES[name]
        model = built(source, case, framework)
        near(model.encode(cases.TEXTS, batch_size=4, **case["encode"]), RECORDED[f"encode/{name}"])
    model.save_pretrained(tmp_path / "saved")
    expected = model.encode(cases.TEXTS)
    for reader in (framework, "pt"):
        near(SentenceTransformer(tmp_path / "saved", framework=reader).encode(cases.TEXTS), expected)
    assert isinstance(model.similarity(expected, expected), np.ndarray)
    assert all(value.shape for value in model.parameters())


def check_outputs(tmp_path: Path, framework: str, array: type[Any]) -> None:
    """Arrays of the framework, and arguments that it refuses."""
    model = SentenceTransformer(cases.write(tmp_path / "model", "MPNet"), framework=framework)
    expected = model.encode(cases.TEXTS)
    tensor = model.encode(cases.TEXTS, convert_to_tensor=True)
    assert isinstance(tensor, array)
    np.testing.assert_array_equal(np.asarray(tensor), expected)
    states = model.encode(cases.TEXTS, output_value="token_embeddings")
    assert all(isinstance(row, array) for row in states)
    near(np.stack([np.asarray(row).mean(0) for row in states]), expected)
    rows = model.encode(cases.TEXTS, convert_to_numpy=False)
    assert all(isinstance(row, array) for row in rows)
    assert model.encode([], convert_to_tensor=True).shape == (0,)
    for call in (model.half, model.train):
        try:
            call()
        except ValueError:
            continue
        raise AssertionError(call)


def check_scores(tmp_path: Path, framework: str) -> None:
    """CrossEncoder with one label and with three, on MPNet and GPT Neo."""
    for family, labels in (("MPNet", 3), ("GPTNeo", 1)):
        folder = cases.write(tmp_path / family, family, "ForSequenceClassification", num_labels=labels)
        found = CrossEncoder(folder, framework=framework).predict(cases.PAIRS, batch_size=2)
        expected = RECORDED[f"predict/{family}-{labels}"]
        near(found.reshape(4, -1), expected.reshape(4, -1), SCORES)
