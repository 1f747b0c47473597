"""Folders of float8: blocks, channels and tensors, of fp8 and compressed-tensors; declarations, damaged files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import same
from safetensors.torch import load_file, save_file
from test_gptq_awq import tiny
from tiny_families import randomised

import monoblock
from monoblock import AutoModelForCausalLM
from monoblock.checkpoint import casts
from monoblock.checkpoint.dense_config import DenseDeclaration
from monoblock.checkpoint.dense_tensors import FLOAT8, Float8Tensors
from monoblock.checkpoint.hub import HubOptions, find_weights
from monoblock.checkpoint.store import open_store
from monoblock.cli.info import describe
from monoblock.cli.options import DownloadOptions
from monoblock.conversion.convert import convert
from monoblock.errors import CheckpointError, ShapeMismatch, UnsupportedConfig

torch.set_num_threads(1)

IDS = torch.arange(3, 15)[None]
BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
TENSOR = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
LAST = "model.layers.1.mlp.down_proj."


def scheme(strategy: str, **weights: Any) -> dict[str, Any]:
    how = {
        "num_bits": 8,
        "type": "float",
        "strategy": strategy,
        "symmetric": True,
        "dynamic": False,
    } | weights
    group = {"weights": how, "input_activations": {"num_bits": 8, "type": "float"}, "targets": ["Linear"]}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
    }


def quantised(
    weight: torch.Tensor, block: tuple[int, int], scales: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix in float8, its scale per block, and the weights in bfloat16; by torch's casts."""
    (height, width), (rows, columns) = block, weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % width, 0, -rows % height))
    blocks = padded.unflatten(0, (-1, height)).unflatten(2, (-1, width))
    scale = (blocks.abs().amax((1, 3)) / 448).to(scales)
    if scales == torch.float8_e8m0fnu:
        scale = torch.exp2((blocks.abs().amax((1, 3)) / 448).log2().ceil()).to(scales)
    spread = scale.float().repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns]
    made = (weight.float() / spread).to(torch.float8_e4m3fn)
    return made, scale, (made.float() * spread).bfloat16()


def write(
    folder: Path,
    how: dict[str, Any] | None,
    block: Any = (128, 128),
    *,
    scales: torch.dtype = torch.float32,
    end: str = "weight_scale_inv",
    shape: tuple[int, ...] | None = None,
    family: str = "mistral",
    more: tuple[str, ...] = (),
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:
    """Write a folder with the blocks' matrices in float8; returns their weights by module. `block`: None is the whole
    matrix, "row" a row; `shape`: of the stored scales; `more`: names of scales of activations."""
    model = randomised(tiny(family)).to(dtype)
    model.save_pretrained(folder)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        weight = module.weight.detach()
        size: Any = (1, weight.shape[1]) if block == "row" else block or tuple(weight.shape)
        tensors[f"{name}.weight"], scale, expected[name] = quantised(weight, size, scales)
        tensors[f"{name}.{end}"] = scale if shape is None else scale.reshape(shape)
        tensors |= {f"{name}.{other}": torch.ones(()) for other in more}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    declared = {} if how is None else {"quantization_config": how}
    (folder / "config.json").write_text(json.dumps(config | declared))
    return expected


def check(model: Any, expected: dict[str, torch.Tensor]) -> None:
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).weight, weight), name


FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (BLOCK | {"fmt": "e4m3", "modules_to_not_convert": ["lm_head"]}, {}),
    (BLOCK | {"weight_block_size": [96, 80]}, {"block": (96, 80), "scales": torch.bfloat16}),
    (BLOCK | {"scale_fmt": "ue8m0"}, {"scales": torch.float8_e8m0fnu}),
    (TENSOR, {"block": None, "shape": (), "more": ("activation_scale",), "scales": torch.bfloat16}),
    (
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        {"block": None, "shape": (1,), "end": "weight_scale", "more": ("input_scale",)},
    ),
    (scheme("tensor"), {"block": None, "shape": (1,), "end": "weight_scale"}),
    (scheme("channel"), {"block": "row", "end": "weight_scale", "scales": torch.bfloat16}),
    (scheme("block", block_structure=[128, 128]), {"end": "weight_scale"}),
]


def test_every_value() -> None:
    found = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(FLOAT8, found)
    assert np.signbit(FLOAT8[128]) and np.isnan(FLOAT8).sum() == 2


@pytest.mark.parametrize(("how", "options"), FORMS)
@pytest.mark.parametrize("family", ["mistral", "mpt"])
@torch.no_grad()
def test_weights(
    family: str,
    how: dict[str, Any],
    options: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    expected = write(tmp_path, how, family=family, **options)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    check(model, expected)
    assert not any(info.values()) and model.dtype == torch.bfloat16 and not model.is_quantized
    said = [record.getMessage() for record in caplog.records]
    assert sum(f"{len(expected)} matrices in float8" in text for text in said) == 1
    assert sum("quantises activations" in text for text in said) == 1
    model.generate(IDS, max_new_tokens=3)
    assert model.decoding_path() == "native step"


def test_saved_and_quantised_again(tmp_path: Path) -> None:
    expected = write(tmp_path / "theirs", BLOCK)
    AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "own")
    assert "quantization_config" not in json.loads((tmp_path / "own" / "config.json").read_text())
    check(AutoModelForCausalLM.from_pretrained(tmp_path / "own"), expected)
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name, quantization_config="int8")
        for name in ("theirs", "own")
    ]
    assert all(model.quantization_config == monoblock.WeightOnlyConfig() for model in models)
    assert torch.equal(models[0](IDS).logits, models[1](IDS).logits)


def test_float16_is_loaded_in_bfloat16(tmp_path: Path) -> None:
    write(tmp_path, BLOCK, dtype=torch.float16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_as_numpy_arrays(tmp_path: Path) -> None:
    expected = write(tmp_path, BLOCK | {"scale_fmt": "ue8m0"}, scales=torch.float8_e8m0fnu)
    store = open_store(find_weights(tmp_path, HubOptions()), "np")
    found = Float8Tensors(store, DenseDeclaration(source="fp8", per="block", block=(128, 128)), "np")
    weight = found.tensor(LAST + "weight")
    assert casts.dtype_of(weight) == "BF16"
    np.testing.assert_array_equal(casts.widened(weight), expected[LAST[:-1]].float().numpy())


def test_info(tmp_path: Path) -> None:
    write(tmp_path, BLOCK)
    found = describe(str(tmp_path), DownloadOptions())
    assert found["quantization"]["summary"] == (
        "float8 by fp8, a scale per block of 128 x 128; loaded as bfloat16"
    )
    assert found["stored"]["F8_E4M3"] > 0


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            BLOCK | {"activation_scheme": "per_token"},
            "activation_scheme='per_token' is not supported for fp8",
        ),
        (BLOCK | {"fmt": "e5m2"}, "fmt='e5m2' is not supported"),
        (BLOCK | {"weight_block_size": [128]}, r"weight_block_size=\[128\] is not supported"),
        (BLOCK | {"weight_block_size": [128, 0]}, "two positive integers"),
        (BLOCK | {"weight_block_size": [128, True]}, "two positive integers"),
        (BLOCK | {"kv_cache_scheme": "fp8"}, "kv_cache_scheme='fp8' is not supported"),
        (BLOCK | {"rotation": 3}, "unknown field 'rotation'"),
        (scheme("group", group_size=128), "strategy='group' is not supported"),
        (scheme("channel", num_bits=4), "num_bits=4 is not supported"),
        (scheme("channel", type="int"), "type='int' is not supported"),
        (scheme("channel", symmetric=False), "symmetric=False is not supported"),
        (scheme("channel", dynamic=True), "dynamic=True is not supported"),
        (scheme("block"), "block_structure=None is not supported"),
    ],
)
def test_declarations_that_are_not_supported(how: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, how)
    with pytest.raises(UnsupportedConfig, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def _with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(torch.uint8)[7, 9] = 0x7F
    return tensor


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight_scale_inv", lambda _: None, f"has {LAST}weight in float8, but no {LAST}weight_scale_inv"),
        ("weight_scale_inv", lambda t: t[:, :-1].contiguous(), "scale per block has F32"),
        ("weight_scale_inv", lambda t: t.double(), "is F64"),
        ("weight_scale_inv", lambda t: t * float("nan"), "scales that are not finite"),
        ("weight_scale_inv", lambda t: torch.full_like(t, 3e38), "weights that are not finite"),
        ("weight", _with_nan, "weights that are not finite"),
        ("weight", lambda t: t.to(torch.float8_e5m2), "only matrices of F8_E4M3 are read"),
        ("weight", lambda t: t.flatten(), "only matrices of F8_E4M3 are read"),
        ("weight", lambda t: t[:, :64].contiguous(), "scale per block has F32"),
        ("weight", lambda t: t[:-1].contiguous(), "down_proj"),
        ("weight", lambda t: t.bfloat16(), "but no float8 matrix of that name"),
    ],
)
def test_damaged_tensors(name: str, change: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, BLOCK)
    tensors = load_file(tmp_path / "model.safetensors")
    changed = change(tensors.pop(LAST + name))
    save_file(tensors | ({} if changed is None else {LAST + name: changed}), tmp_path / "model.safetensors")
    with pytest.raises((CheckpointError, ShapeMismatch), match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_declarations_that_do_not_fit_the_tensors(tmp_path: Path) -> None:
    write(tmp_path / "a", None)
    with pytest.raises(CheckpointError, match=r"as fp8 or compressed-tensors .* writes them, but neither"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    write(tmp_path / "b", {"quant_method": "gptq", "bits": 4, "group_size": 128})
    with pytest.raises(CheckpointError, match="declares gptq, but the tensors are those of fp8"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "b")


def test_convert_dequantises(tmp_path: Path) -> None:
    write(tmp_path / "theirs", BLOCK)
    assert convert(tmp_path / "theirs", tmp_path / "new").dtype == "bfloat16"
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("theirs", "new"))
    assert same(one, two)
