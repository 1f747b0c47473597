"""Checkpoints shared by PyTorch and Flax: bitwise equality, dtypes, missing heads, shards, safetensors and msgpack; and
losses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from extra_tensors import VALUE_HEAD, with_value_head
from flax_models import CLASSES, config_of, flax_model, ids_of, same_bits, torch_model
from helpers import same
from measure import assert_close

import monoblock
from monoblock.backends.flax import loading
from monoblock.errors import HubError, ShapeMismatch, UnexpectedKeys

NAME = "GPTNeoForCausalLM"


def bits(model: Any) -> dict[str, np.ndarray]:
    """The weights by their names in files; bfloat16 with JAX's dtype."""
    state = model.hub_state_dict()
    if not isinstance(next(iter(state.values())), torch.Tensor):
        return state
    whole = {name: tensor.float().numpy() for name, tensor in state.items()}
    return {n: x.astype(jnp.bfloat16) if state[n].dtype == torch.bfloat16 else x for n, x in whole.items()}


@pytest.mark.parametrize("name", CLASSES)
def test_round_trip_from_pytorch_is_bitwise_equal(name: str, tmp_path: Path) -> None:
    theirs = torch_model(name)
    theirs.save_pretrained(tmp_path / "torch")
    cls = getattr(monoblock, "Flax" + name)
    model = cls.from_pretrained(tmp_path / "torch")
    assert same_bits(bits(model), bits(theirs))
    model.save_pretrained(tmp_path / "flax")
    assert same(getattr(monoblock, name).from_pretrained(tmp_path / "flax"), theirs)
    files = ("model.safetensors", "config.json")
    for file in files:
        assert (tmp_path / "flax" / file).read_bytes() == (tmp_path / "torch" / file).read_bytes()
    assert {p.name for p in (tmp_path / "flax").iterdir()} == {p.name for p in (tmp_path / "torch").iterdir()}


MSGPACK = [NAME, "MPNetForMaskedLM", "OpenAIGPTDoubleHeadsModel", "FuyuForCausalLM", "MistralModel"]


@pytest.mark.parametrize("name", MSGPACK)
def test_msgpack_files(name: str, tmp_path: Path) -> None:
    """The file holds the parameter tree; PyTorch's class reads it too."""
    model = flax_model(name)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "model.safetensors").exists()
    tree = flax.serialization.msgpack_restore((tmp_path / "flax_model.msgpack").read_bytes())
    assert same_bits(loading.flat(tree), loading.flat(model.params))
    again = type(model).from_pretrained(tmp_path)
    assert same_bits(bits(again), bits(model))
    assert same(getattr(monoblock, name).from_pretrained(tmp_path), torch_model(name))


def test_parameters_have_the_dtype_of_the_files(tmp_path: Path) -> None:
    half = copy.deepcopy(torch_model(NAME)).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    model = monoblock.FlaxGPTNeoForCausalLM.from_pretrained(tmp_path, dtype=jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}
    assert model.dtype == jnp.float32 and model(ids_of()).logits.dtype == jnp.float32
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"
    model.save_pretrained(tmp_path / "whole", params=model.to_fp32(model.params))
    again = monoblock.GPTNeoForCausalLM.from_pretrained(tmp_path / "whole")
    assert again.dtype == torch.float32
    positional = monoblock.FlaxGPTNeoForCausalLM.from_pretrained(tmp_path, jnp.bfloat16)
    assert positional.dtype == jnp.bfloat16


def test_do_init_false_returns_model_and_params(tmp_path: Path) -> None:
    flax_model(NAME).save_pretrained(tmp_path)
    model, params = monoblock.FlaxGPTNeoForCausalLM.from_pretrained(tmp_path, _do_init=False, seed=5)
    assert model.seed == 5
    assert np.array_equal(model(ids_of(), params=params).logits, flax_model(NAME)(ids_of()).logits)
    with pytest.raises(ValueError, match="_do_init=False"):
        model.save_pretrained(tmp_path / "none")
    model.save_pretrained(tmp_path / "given", params=params)
    assert (tmp_path / "given" / "model.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()


def test_a_missing_head_is_initialised(tmp_path: Path, logs: pytest.LogCaptureFixture) -> None:
    flax_model(NAME).save_pretrained(tmp_path)
    cls = monoblock.FlaxGPTNeoForTokenClassification
    model = cls.from_pretrained(tmp_path, num_labels=5)
    assert any("newly initialised" in text and "classifier.weight" in text for text in logs.messages)
    assert model.params["classifier"]["kernel"].shape == (36, 5)
    assert same_bits(
        loading.flat(model.params["transformer"]), loading.flat(flax_model(NAME).params["transformer"])
    )
    apart, params = cls.from_pretrained(tmp_path, num_labels=5, _do_init=False)
    assert list(params) == ["transformer"]
    assert any("not in params" in text for text in logs.messages)
    whole = apart.init_weights(jax.random.PRNGKey(0), params=params)
    assert whole["classifier"]["kernel"].shape == (36, 5)
    base = monoblock.FlaxAutoModel.from_pretrained(tmp_path)
    assert type(base) is monoblock.FlaxGPTNeoModel


def test_mismatched_sizes(tmp_path: Path) -> None:
    flax_model("GPTNeoForTokenClassification").save_pretrained(tmp_path)
    cls = monoblock.FlaxGPTNeoForTokenClassification
    with pytest.raises(ShapeMismatch, match=r"classifier.weight .* is \[4, 36\] .* implies \[7, 36\]"):
        cls.from_pretrained(tmp_path, num_labels=7)
    model = cls.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert model.params["classifier"]["kernel"].shape == (36, 7)


def test_shards(tmp_path: Path) -> None:
    model = flax_model(NAME)
    for safe, index in ((True, "model.safetensors.index.json"), (False, "flax_model.msgpack.index.json")):
        folder = tmp_path / str(safe)
        model.save_pretrained(folder, max_shard_size="40kB", safe_serialization=safe)
        assert (folder / index).exists()
        assert same_bits(bits(type(model).from_pretrained(folder)), bits(model))


def test_invalid_arguments_of_from_pretrained_raise(tmp_path: Path) -> None:
    cls = monoblock.FlaxGPTNeoForCausalLM
    flax_model(NAME).save_pretrained(tmp_path)
    for name, value in (
        ("torch_dtype", "bfloat16"),
        ("device_map", "auto"),
        ("load_in_4bit", True),
        ("attn_implementation", "eager"),
    ):
        with pytest.raises(ValueError, match=f"from_pretrained of a Flax class does not take {name}: "):
            cls.from_pretrained(tmp_path, **{name: value})
    with pytest.raises(TypeError, match="does not know the argument 'dtyp'"):
        cls.from_pretrained(tmp_path, dtyp=jnp.float32)
    with pytest.raises(TypeError, match="two positional arguments"):
        cls.from_pretrained(tmp_path, jnp.float32, 1)
    with pytest.raises(ValueError, match="use AutoConfig"):
        monoblock.FlaxMistralForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="push_to_hub"):
        flax_model(NAME).save_pretrained(tmp_path, push_to_hub=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="needs a folder"):
        flax_model(NAME).save_pretrained(tmp_path / "file")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(HubError, match="has no weights"):
        cls.from_pretrained(tmp_path)


def test_unknown_and_missing_names_raise(tmp_path: Path) -> None:
    model = flax_model(NAME)
    state = model.hub_state_dict() | {"transformer.wte.weigth": np.zeros(3, np.float32)}
    with pytest.raises(
        UnexpectedKeys, match=r"transformer\.wte\.weigth, which is no parameter .* nearest is transf"
    ):
        model.params_from_hub(state)
    del state["transformer.wte.weigth"], state["transformer.wpe.weight"]
    with pytest.raises(monoblock.MissingKeys, match=r"transformer\.wpe\.weight"):
        model.params_from_hub(state)


def test_auto_classes(tmp_path: Path) -> None:
    flax_model("MPNetForMaskedLM").save_pretrained(tmp_path)
    model = monoblock.FlaxAutoModelForMaskedLM.from_pretrained(tmp_path, dtype=jnp.bfloat16)
    assert type(model) is monoblock.FlaxMPNetForMaskedLM and model.dtype == jnp.bfloat16
    made = monoblock.FlaxAutoModelForMultipleChoice.from_config(config_of("MPNetModel"), seed=3)
    assert type(made) is monoblock.FlaxMPNetForMultipleChoice and made.seed == 3
    with pytest.raises(ValueError, match="FlaxAutoModelForCausalLM has no class for 'mpnet'"):
        monoblock.FlaxAutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="FlaxAutoModel cannot be instantiated"):
        monoblock.FlaxAutoModel()


@pytest.mark.parametrize("name", CLASSES)
def test_losses_equal_pytorchs(name: str) -> None:
    """Computed from PyTorch's logits, so that only the losses are compiled."""
    rng = np.random.default_rng(0)
    model, theirs = flax_model(name), torch_model(name)
    kind = model.row.head
    labels = LABELLED.get(kind or "")
    if labels is None:
        with pytest.raises(ValueError, match=r"no head, so no loss|no labels"):
            model.compute_loss(monoblock.FlaxBaseModelOutput())
        return
    shape = (2, 2, 7) if kind in ("choice", "double") else (2, 7)
    ids = torch.as_tensor(rng.integers(10, 80, shape))
    given = {key: torch.as_tensor(value) for key, value in labels.items()}
    for count in (None, 5):
        with torch.no_grad():
            out = theirs(ids, **given, num_items_in_batch=count)
        found = {k: v.numpy() for k, v in out.items() if k.endswith("logits")}
        ours = model.compute_losses(_output(found), **labels, num_items_in_batch=count)
        for key in ("loss", "mc_loss"):
            if key in out:
                assert_close(f"flax: {key}", ours[key], out[key], 1e-5)  # fp32, losses of 2 to 5
        total = model.compute_loss(_output(found), **labels, num_items_in_batch=count)
        assert_close("flax: compute_loss", total, sum(ours.values()), 1e-6)
    with pytest.raises(TypeError, match=r"take .*num_items_in_batch, got 'label'"):
        model.compute_loss(_output(found), label=1)


def _output(found: dict[str, Any]) -> Any:
    kinds = (
        monoblock.FlaxQuestionAnsweringModelOutput,
        monoblock.FlaxOpenAIGPTDoubleHeadsModelOutput,
        monoblock.FlaxMaskedLMOutput,
    )
    return next(kind(**found) for kind in kinds if found.keys() <= kind.__dataclass_fields__.keys())


TOKENS = np.random.default_rng(1).integers(0, 4, (2, 7))
TOKENS[:, 2] = -100
LABELLED: dict[str, dict[str, Any]] = {
    "causal": {"labels": TOKENS},
    "masked": {"labels": TOKENS.tolist()},
    "token": {"labels": TOKENS.astype(np.int32)},
    "sequence": {"labels": np.array([3, 1])},
    "first": {"labels": np.eye(4, dtype=np.float32)[[1, 2]]},
    "choice": {"labels": [1, 0]},
    "span": {"start_positions": np.array([1, 9]), "end_positions": np.array([3, 6])},
    "double": {"labels": np.stack([TOKENS, TOKENS], 1), "mc_labels": np.array([0, 1])},
}


def test_params_of_a_checkpoint_with_extra_tensors(tmp_path: Path) -> None:
    torch_model(NAME).save_pretrained(tmp_path / "saved")
    model, params, info = monoblock.FlaxGPTNeoForCausalLM.from_pretrained(
        with_value_head(tmp_path / "saved", tmp_path / "headed"),
        strict=False,
        output_loading_info=True,
        _do_init=False,
    )
    assert info["unexpected_keys"] == VALUE_HEAD
    assert np.isfinite(model(ids_of(), params=params).logits).all()
