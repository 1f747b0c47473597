"""Sharding over eight virtual devices: results equal one device's, shards have the expected shapes, and invalid meshes
raise."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax_tiny import MODELS, batch, tiny
from jax.sharding import Mesh, PartitionSpec

TESTS = Path(__file__).parents[1]
FULLY = ("FlaxMistralForCausalLM", "FlaxMptForCausalLM", "FlaxGPTNeoForCausalLM")
LOGITS, GRADIENTS = 1e-5, 5e-5  # fp32; sums of four partial sums: measured 3e-6 and 4e-7


# The layers' matrices by their names in the families, and the token embeddings.
_QKV = ("q_proj", "k_proj", "v_proj", "q", "k", "v", "Wqkv", "query_key_value", "c_attn")
_UP = ("gate_proj", "up_proj", "c_fc", "dense_h_to_4h", "intermediate.dense")
_OUT = ("o_proj", "out_proj", "o", "self_attn.dense", "c_proj", "down_proj", "dense_4h_to_h", "output.dense")
WIDENING = tuple(f".{name}.kernel" for name in (*_QKV, *_UP))
NARROWING = tuple(f".{name}.kernel" for name in _OUT)
VOCABULARY = tuple(f".{x}.embedding" for x in ("wte", "embed_tokens", "tokens_embed", "word_embeddings"))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Comparisons of eight virtual devices with one, by a script (about 20 s, all compilation)."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, str(TESTS / "flax_sharded.py"), str(tmp_path_factory.mktemp("meshes"))]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def found(outputs: dict[str, Any]) -> dict[str, Any]:
    """Each family on a mesh with explicit axes."""
    return outputs["families"]


@pytest.fixture(scope="module")
def meshes(outputs: dict[str, Any]) -> dict[str, Any]:
    """Other meshes."""
    return outputs["meshes"]


@pytest.mark.parametrize("name", MODELS)
def test_mesh_equals_one_device(name: str, found: dict[str, Any]) -> None:
    assert found[name]["logits"] <= LOGITS
    assert found[name]["gradients"] <= GRADIENTS
    assert found[name]["rows"][0] == 2  # of 4, over two devices


def test_generation_under_sharded_parameters(found: dict[str, Any]) -> None:
    tokens = {name: result["tokens"] for name, result in found.items() if "tokens" in result}
    assert tokens == {"FlaxOpenAIGPTLMHeadModel": True}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_gradients_are_sharded(name: str, found: dict[str, Any]) -> None:
    """Each of four devices holds a quarter of every matrix of the layers and of the vocabulary."""
    for shapes in (found[name]["shapes"], found[name]["gradient_shapes"]):
        for leaf, (whole, shard) in shapes.items():
            if leaf.endswith(WIDENING) or leaf == "lm_head.kernel":
                assert shard[1] * 4 == whole[1], leaf
            elif leaf.endswith(NARROWING) or leaf.endswith(VOCABULARY):
                assert shard[0] * 4 == whole[0], leaf
            else:
                assert not re.search(r"\.0\..*kernel$", leaf), leaf  # no matrix of a layer is replicated
            if leaf.endswith(("scale", "weight")):
                assert shard == whole, leaf


def test_shard_map_over_the_data(found: dict[str, Any]) -> None:
    assert found["shard_map"]["loss"] <= LOGITS
    assert found["shard_map"]["gradients"] <= GRADIENTS


@pytest.mark.parametrize("name", FULLY)
def test_fully_sharded_training_equals_one_device(name: str, meshes: dict[str, Any]) -> None:
    result = meshes[name]
    assert result["logits"] <= LOGITS
    assert result["gradients"] <= GRADIENTS
    assert result["parameters"] <= GRADIENTS


@pytest.mark.parametrize("name", FULLY)
def test_fully_sharded_parameters_moments_and_hidden_states(name: str, meshes: dict[str, Any]) -> None:
    """A device holds half of every matrix along the fsdp axis and half along the tensor axis; and full hidden states of
    one of four rows, not shards of two rows."""
    result = meshes[name]
    assert result["first_moments"] == result["shapes"]
    split = {
        leaf for leaf, (whole, shard) in result["shapes"].items() if np.prod(shard) * 4 == np.prod(whole)
    }
    matrices = {leaf for leaf in result["shapes"] if leaf.endswith(("kernel", "embedding"))}
    assert split == {leaf for leaf in matrices if ".wpe." not in leaf}
    for leaf, (whole, shard) in result["shapes"].items():
        if leaf.endswith(("scale", "weight")) or ".wpe." in leaf:
            assert shard == whole, leaf
    assert result["hidden"] == [1, 14, 32]


def test_tuples_of_axes(meshes: dict[str, Any]) -> None:
    result = meshes["several"]
    assert result["logits"] <= LOGITS
    assert result["rows"] == [1, 14]  # of 4, over replica and data
    assert result["shapes"]["model.layers.0.mlp.up_proj.kernel"] == [[32, 48], [32, 12]]


def test_explicit_axes_of_the_context(meshes: dict[str, Any]) -> None:
    result = meshes["context"]
    assert result["logits"] <= LOGITS
    assert result["gradients"] <= GRADIENTS
    assert result["tokens"] and result["looped"]
    assert result["type"] == "float32[4@data,14,64@tensor]"
    assert result["gradient_types"] == result["parameter_types"]
    assert "float32[32,48@tensor]" in result["parameter_types"]


def test_checkpoints_are_read_by_shard(meshes: dict[str, Any]) -> None:
    result = meshes["loaded"]
    assert result["equal"] and result["placed"] and result["head"]
    assert set(result["read"]) == {16}  # of 64 numbers, for each device


# ---------------------------------------------------------------------------- specs and errors, on one device


def mesh(*names: str) -> Mesh:
    return Mesh(np.array(jax.devices()[:1]).reshape((1,) * len(names)), names)


def test_partition_specs_have_the_structure_of_params() -> None:
    model = tiny("FlaxMistralForCausalLM")
    specs = model.partition_specs(mesh("data", "tensor"))
    assert jax.tree.structure(specs) == jax.tree.structure(model.params)
    layer = specs["model"]["layers"]["0"]
    assert layer["self_attn"]["q_proj"]["kernel"] == PartitionSpec(None, "tensor")
    assert layer["mlp"]["down_proj"]["kernel"] == PartitionSpec("tensor", None)
    assert specs["model"]["embed_tokens"]["embedding"] == PartitionSpec("tensor", None)
    assert layer["input_layernorm"]["weight"] == PartitionSpec()


def test_axis_names_are_options() -> None:
    model = tiny("FlaxMistralForCausalLM")
    specs = model.partition_specs(mesh("x", "model"), tensor_axis="model")
    assert specs["model"]["embed_tokens"]["embedding"] == PartitionSpec("model", None)
    whole = model.partition_specs(mesh("data"), tensor_axis=None)
    assert set(jax.tree.leaves(whole)) == {PartitionSpec()}
    assert model.shard_batch(batch(), mesh("rows"), data_axis="rows")["input_ids"].shape == (4, 14)


def test_shard_params_of_given_params() -> None:
    model = tiny("FlaxMistralForCausalLM")
    params, model._params = model.params, None
    placed = model.shard_params(mesh("data", "tensor"), params)
    assert model._params is None
    assert placed["model"]["embed_tokens"]["embedding"].sharding.spec == PartitionSpec("tensor", None)


def test_shard_moves_params_to_the_mesh() -> None:
    model = tiny("FlaxMistralForCausalLM")
    assert model.shard(mesh("data", "tensor")) is model
    shardings = model.param_shardings(mesh("data", "tensor"))
    assert jax.tree.map(lambda leaf: leaf.sharding, model.params) == shardings


def test_meshes_without_the_axis_raise() -> None:
    model = tiny("FlaxMistralForCausalLM")
    with pytest.raises(
        ValueError, match=r"no axis 'tensor' \(it has 'data'\): give tensor_axis= one of these or None"
    ):
        model.partition_specs(mesh("data"))
    with pytest.raises(ValueError, match=r"no axis 'data' \(it has 'x', 'y'\): give data_axis="):
        model.shard_batch(batch(), mesh("x", "y"))
    with pytest.raises(ValueError, match="shard_batch needs a mesh axis for the rows"):
        model.shard_batch(batch(), mesh("x"), data_axis=None)
    with pytest.raises(ValueError, match="'x' is in both tensor_axis and fsdp_axis"):
        model.partition_specs(mesh("x", "y"), tensor_axis=("y", "x"), fsdp_axis="x")
    with pytest.raises(ValueError, match="names an axis twice"):
        model.partition_specs(mesh("x"), tensor_axis=("x", "x"))
    with pytest.raises(ValueError, match="tensor_axis names an axis of a mesh: give mesh="):
        type(model).from_pretrained("nowhere", tensor_axis="x")


def test_fsdp_axis_shards_parameters_and_rows() -> None:
    model = tiny("FlaxGPTNeoForCausalLM")
    specs = model.partition_specs(mesh("fsdp", "tensor"), fsdp_axis="fsdp")["transformer"]
    layer = specs["h"]["0"]
    assert specs["wte"]["embedding"] == PartitionSpec("tensor", "fsdp")
    assert specs["wpe"]["embedding"] == PartitionSpec()
    assert layer["attn"]["attention"]["q_proj"]["kernel"] == PartitionSpec("fsdp", "tensor")
    assert layer["mlp"]["c_proj"]["kernel"] == PartitionSpec("tensor", "fsdp")
    assert layer["mlp"]["c_fc"]["bias"] == PartitionSpec("tensor")
    assert layer["ln_1"]["scale"] == PartitionSpec()
    rows = model.shard_batch(batch(), mesh("x", "y", "fsdp"), data_axis=("x", "y"), fsdp_axis="fsdp")
    assert rows["input_ids"].sharding.spec == PartitionSpec(("x", "y", "fsdp"))
    both = model.shard_batch(batch(), mesh("data"), fsdp_axis="data")
    assert both["input_ids"].sharding.spec == PartitionSpec("data")


def test_rows_that_do_not_divide_raise() -> None:
    with pytest.raises(
        ValueError, match=r"\['count'\] of shape \(\).* axis 'data': give a multiple of 1 rows"
    ):
        tiny("FlaxMistralForCausalLM").shard_batch({"count": np.array(3)}, mesh("data"))
