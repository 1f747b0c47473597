"""Pipelines on JAX: the answers are PyTorch's, and what is compiled for one length serves its neighbours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from pipeline_checks import CASES, NAMES, assert_equivalent, compare, image_outputs
from tiny_families import fields
from tiny_pipelines import TEXT, folder

import monoblock
from monoblock import AutoTokenizer, pipeline
from monoblock.backends.flax.pipeline_adapter import rounded
from monoblock.backends.flax.pretrained import forward

CPU = jax.devices("cpu")[0]


@pytest.fixture(scope="module")
def labelling(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(folder(tmp_path_factory.mktemp("labels"), "MPNetForSequenceClassification"))


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_answers_are_those_of_pytorch(case: Any, tmp_path: Path) -> None:
    compare(case, "flax", tmp_path)


def test_texts_about_images(tmp_path: Path) -> None:
    assert_equivalent(*image_outputs("flax", tmp_path))


def test_ten_lengths_in_a_bucket_compile_once(labelling: str) -> None:
    pipe = pipeline("text-classification", labelling, framework="flax")
    before = forward._cache_size()
    for count in range(3, 13):
        pipe(" ".join(["dog"] * count))
    assert forward._cache_size() == before + 1
    for size in (1, 5, 6):  # rows are rounded up: 5 are 6
        pipe(["the dog"] * 6, batch_size=size)
    assert forward._cache_size() == before + 2
    assert [rounded(rows) for rows in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]


def test_without_a_mask_the_pad_id_says_where_a_text_ends(tmp_path: Path) -> None:
    """A mask of padding alone would say otherwise of a text that ends with that token."""
    place = str(folder(tmp_path, "MistralForSequenceClassification"))
    ours, theirs = (
        pipeline("text-classification", place, framework=framework, device=-1) for framework in ("flax", "pt")
    )
    for pipe in (ours, theirs):
        pipe.tokenizer.model_input_names = ["input_ids"]
    assert_equivalent(ours("the dog<pad>", top_k=None), theirs("the dog<pad>", top_k=None))
    assert_equivalent(ours("the dog<pad>", top_k=None), ours("the dog", top_k=None))


@pytest.mark.parametrize("asked", ["bfloat16", jnp.bfloat16, torch.bfloat16], ids=["name", "jax", "torch"])
def test_a_dtype_is_of_weights_and_computation(labelling: str, asked: Any) -> None:
    pipe = pipeline(model=labelling, framework="flax", dtype=asked)
    assert pipe.dtype == pipe.model.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(pipe.model.params)} == {jnp.dtype(jnp.bfloat16)}
    [label] = pipe("the dog")
    assert label["score"] == pytest.approx(
        pipeline(model=labelling, device=-1)("the dog")[0]["score"], abs=0.05
    )


def test_the_checkpoints_own_dtype_by_default(labelling: str, tmp_path: Path) -> None:
    half = pipeline(model=labelling, framework="flax", torch_dtype="float16")
    half.save_pretrained(tmp_path)
    for dtype in ("auto", None):
        again = pipeline(model=tmp_path, framework="flax", dtype=dtype)
        assert again.dtype == jnp.float16
        assert again("the dog") == half("the dog")
    wide = pipeline(model=tmp_path, framework="flax", model_kwargs={"torch_dtype": "float32"})
    assert wide.dtype == jnp.float32


@pytest.mark.parametrize("device", [None, -1, 0, "cpu", "cpu:0", CPU], ids=str)
def test_devices(labelling: str, device: Any) -> None:
    assert pipeline(model=labelling, framework="flax", device=device).device == CPU


def test_objects(labelling: str) -> None:
    model = monoblock.FlaxMPNetModel.from_pretrained(labelling)
    tokenizer = AutoTokenizer.from_pretrained(labelling)
    pipe = pipeline(model=model, tokenizer=tokenizer)
    assert (pipe.task, pipe.model, pipe.dtype) == ("feature-extraction", model, jnp.float32)
    features = pipe(TEXT, truncation=True, return_tensors=True)
    assert isinstance(features, jax.Array)
    assert features.dtype == jnp.float32
    assert_equivalent(features.tolist(), pipe(TEXT, truncation=True))
    model.params = jax.device_get(model.params)
    assert pipeline(model=model, tokenizer=tokenizer).device == CPU
    assert isinstance(jax.tree.leaves(model.params)[0], jax.Array)


def test_sampling_differs_from_call_to_call_unless_there_is_a_seed() -> None:
    pipe = pipeline("text-generation", framework="flax", max_new_tokens=8, return_full_text=False)
    assert type(pipe.model).__name__ == "FlaxMptForCausalLM"
    [[one], [other]] = pipe("def "), pipe("def ")
    assert one != other
    assert pipe("def ", seed=3) == pipe("def ", seed=3)


def test_what_is_refused(labelling: str) -> None:
    model = monoblock.FlaxMPNetModel(monoblock.MPNetConfig(**fields("mpnet")), _do_init=False)
    given: dict[str, Any] = {"model": labelling, "framework": "flax"}
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        ("does not take device_map", {"device_map": "auto"}),
        (
            "does not take quantization_config",
            {"model_kwargs": {"quantization_config": {"load_in_8bit": True}}},
        ),
        ("does not take attn_implementation", {"model_kwargs": {"attn_implementation": "sdpa"}}),
        ("device='gpu:3' is no device here", {"device": "gpu:3"}),
        ("there are 0 accelerators", {"device": 1}),
        ("dtype must be", {"dtype": "int8"}),
        ("holds its params", {"model_kwargs": {"_do_init": False}}),
        ("holds its params", {"model": model, "tokenizer": labelling, "framework": None}),
        ("of framework='flax'", {"model": model, "tokenizer": labelling, "framework": "pt"}),
    )
    for message, arguments in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            pipeline(**{**given, **arguments})
