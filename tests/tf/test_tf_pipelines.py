"""Pipelines on TensorFlow: the answers are PyTorch's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
import torch
from pipeline_checks import CASES, NAMES, assert_equivalent, compare, image_outputs
from tiny_pipelines import TEXT, folder

import monoblock
from monoblock import AutoTokenizer, pipeline


@pytest.fixture(scope="module")
def labelling(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(folder(tmp_path_factory.mktemp("labels"), "MPNetForSequenceClassification"))


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_answers_are_those_of_pytorch(case: Any, tmp_path: Path) -> None:
    # XLA takes seconds for each program: of those that generate, one does.
    settings = {"disable_compile": True} if case[1] == "OpenAIGPTLMHeadModel" else {}
    compare(case, "tf", tmp_path, **settings)


def test_texts_about_images(tmp_path: Path) -> None:
    assert_equivalent(*image_outputs("tf", tmp_path, disable_compile=True))


def test_sampling_differs_from_call_to_call_unless_there_is_a_seed() -> None:
    pipe = pipeline("text-generation", framework="tf", max_new_tokens=8, return_full_text=False)
    assert type(pipe.model).__name__ == "TFMptForCausalLM"
    [[one], [other]] = pipe("def "), pipe("def ")
    assert one != other
    assert pipe("def ", seed=3) == pipe("def ", seed=3)


@pytest.mark.parametrize("asked", ["bfloat16", tf.bfloat16, torch.bfloat16], ids=["name", "tf", "torch"])
def test_a_dtype_is_of_weights_and_computation(labelling: str, asked: Any) -> None:
    pipe = pipeline(model=labelling, framework="tf", dtype=asked)
    assert pipe.dtype == tf.bfloat16
    assert {weight.dtype for weight in pipe.model.trainable_variables} == {"bfloat16"}
    [label] = pipe("the dog")
    assert label["score"] == pytest.approx(
        pipeline(model=labelling, device=-1)("the dog")[0]["score"], abs=0.05
    )


def test_the_checkpoints_own_dtype_by_default(labelling: str, tmp_path: Path) -> None:
    half = pipeline(model=labelling, framework="tf", torch_dtype="float16")
    half.save_pretrained(tmp_path)
    for dtype in ("auto", None):
        again = pipeline(model=tmp_path, framework="tf", dtype=dtype)
        assert again.dtype == tf.float16
        assert again("the dog") == half("the dog")
    mixed = pipeline(model=tmp_path, framework="tf", model_kwargs={"dtype": "mixed_bfloat16"})
    assert mixed.dtype == tf.bfloat16
    assert {weight.dtype for weight in mixed.model.trainable_variables} == {"float32"}


@pytest.mark.parametrize("device", [None, -1, 0, "cpu", "CPU:0", "/device:CPU:0"], ids=str)
def test_devices(labelling: str, device: Any) -> None:
    assert pipeline(model=labelling, framework="tf", device=device).device == "CPU:0"


def test_objects(labelling: str) -> None:
    model = monoblock.TFMPNetModel.from_pretrained(labelling)
    tokenizer = AutoTokenizer.from_pretrained(labelling)
    pipe = pipeline(model=model, tokenizer=tokenizer)
    assert (pipe.task, pipe.model, pipe.dtype) == ("feature-extraction", model, tf.float32)
    features = pipe(TEXT, truncation=True, return_tensors=True)
    assert tf.is_tensor(features)
    assert features.dtype == tf.float32
    assert_equivalent(features.numpy().tolist(), pipe(TEXT, truncation=True))


def test_what_is_refused(labelling: str) -> None:
    model = monoblock.TFMPNetModel.from_pretrained(labelling)
    given: dict[str, Any] = {"model": labelling, "framework": "tf"}
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
        ("of framework='tf'", {"model": model, "tokenizer": labelling, "framework": "flax"}),
    )
    for message, arguments in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            pipeline(**{**given, **arguments})
