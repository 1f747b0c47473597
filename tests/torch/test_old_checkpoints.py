"""Checkpoints of transformers 4's Flax and TensorFlow classes in the PyTorch classes: outputs, tokens, arguments."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from v4_checkpoints import (
    FLAX,
    FOLDER,
    NAMES,
    TENSORFLOW,
    atol,
    class_name,
    difference,
    exact_atol,
    inputs,
    outputs,
    prompt,
)

import monoblock
from monoblock.conversion.convert import Options, convert
from monoblock.errors import HubError
from monoblock.families import openai_gpt

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _h5py(request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params.get("name", "") if hasattr(request.node, "callspec") else "TF"
    if name.startswith("TF"):
        pytest.importorskip("h5py", reason="reading .h5 files needs h5py")


def loaded(name: str, **kwargs: Any) -> Any:
    return getattr(monoblock, class_name(name)).from_pretrained(FOLDER / name, **kwargs)


def run(model: Any, name: str) -> Any:
    tensors = {key: torch.from_numpy(value) for key, value in inputs(name).items()}
    with torch.no_grad():
        return model(**tensors, output_hidden_states=True, output_attentions=True)


def differences(model: Any, name: str) -> dict[str, float]:
    """The largest difference of each output, over its layers."""
    out = run(model, name)
    worst: dict[str, float] = {}
    for (field, layer), wanted in outputs(name).items():
        got = out[field] if layer is None else out[field][layer]
        worst[field] = max(worst.get(field, 0.0), difference(name, field, got.numpy(), wanted))
    return worst


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_tokens(name: str) -> None:
    model = loaded(name)
    found = differences(model, name)
    assert {"hidden_states", "attentions"} < found.keys()
    assert max(found.values()) <= atol(name, model.spec), found
    if pair := prompt(name):
        sequences = model.generate(torch.from_numpy(pair[0]), max_new_tokens=12, do_sample=False)
        assert np.array_equal(sequences.numpy(), pair[1])


@pytest.mark.parametrize("name", [name for name in TENSORFLOW if "OpenAIGPT" in name])
def test_the_old_gelu_explains_the_difference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any error in the assignment of weights would exceed this."""
    monkeypatch.setitem(openai_gpt.ACTIVATIONS, "gelu", "gelu")
    model = loaded(name)
    found = differences(model, name)
    assert max(found.values()) <= exact_atol(name, model.spec), found


@pytest.mark.parametrize("name", NAMES)
def test_models_with_and_without_a_head_load_each_others_files(name: str) -> None:
    """As with the hub's files: the prefix may be there or not."""
    stem = next(s for s in ("GPTNeo", "Mistral", "MPNet", "OpenAIGPT") if s in name)
    bare = getattr(monoblock, stem + "Model").from_pretrained(FOLDER / name)
    head = loaded(name)
    ours, theirs = (
        {n: p for n, p in model.bare.named_parameters() if "pooler" not in n} for model in (bare, head)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    # Conv1D weights are transposed views.
    assert all(value.is_contiguous() or value.t().is_contiguous() for value in ours.values())


@pytest.mark.parametrize("name", [FLAX[0], "TFMPNetForMaskedLM"])
def test_saved_again_it_is_the_same_model(name: str, tmp_path: Any) -> None:
    model = loaded(name)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model.safetensors"]
    state = again.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_the_arguments_say_which_file_is_read(tmp_path: Any) -> None:
    """One folder with two formats whose values differ."""
    shutil.copytree(FOLDER / "FlaxMistralForCausalLM", tmp_path, dirs_exist_ok=True)
    flax = monoblock.MistralForCausalLM.from_pretrained(tmp_path)
    other = monoblock.MistralForCausalLM(flax.config)
    other.save_pretrained(tmp_path)
    shutil.copy(FOLDER / "TFMistralForCausalLM" / "tf_model.h5", tmp_path)
    tensorflow = loaded("TFMistralForCausalLM")

    def weight(**kwargs: Any) -> torch.Tensor:
        return monoblock.MistralForCausalLM.from_pretrained(tmp_path, **kwargs).get_input_embeddings().weight

    assert torch.equal(weight(), other.get_input_embeddings().weight)
    assert torch.equal(weight(from_flax=False, from_tf=False), other.get_input_embeddings().weight)
    assert torch.equal(weight(from_flax=True), flax.get_input_embeddings().weight)
    assert torch.equal(weight(from_tf=True), tensorflow.get_input_embeddings().weight)
    assert not torch.equal(flax.get_input_embeddings().weight, tensorflow.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="from_flax=True and from_tf=True"):
        weight(from_flax=True, from_tf=True)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "tf_model.h5").unlink()
    assert torch.equal(weight(from_tf=True), flax.get_input_embeddings().weight)  # the only format left
    with pytest.raises(HubError, match=r"expected model\.safetensors"):
        weight(use_safetensors=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype(dtype: torch.dtype) -> None:
    model = loaded(FLAX[0], dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    exact = loaded(FLAX[0])
    pairs = zip(model.parameters(), exact.parameters(), strict=True)
    assert all(torch.equal(a, b.to(dtype)) for a, b in pairs)


@pytest.mark.parametrize("name", ["FlaxGPTNeoModel", "TFMPNetForMaskedLM", "TFOpenAIGPTDoubleHeadsModel"])
def test_conversion(name: str, tmp_path: Any) -> None:
    """The conversion compares the number of tensors, their values, and the logits."""
    convert(FOLDER / name, tmp_path / "hub", Options(check=True))
    old, new = loaded(name), getattr(monoblock, class_name(name)).from_pretrained(tmp_path / "hub")
    state = old.state_dict()
    assert all(torch.equal(state[key], value) for key, value in new.state_dict().items())
