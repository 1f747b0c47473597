"""Folders of compressed-tensors: integers in words and in bytes, by group, channel and tensor."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_files import compressed
from safetensors.torch import load_file, save_file
from test_gptq_awq import check, tiny
from tiny_families import randomised

from monoblock import AutoModelForCausalLM
from monoblock.errors import CheckpointError, ShapeMismatch, UnsupportedConfig

torch.set_num_threads(1)

IDS = torch.arange(3, 15)[None]


def write(
    folder: Path,
    layout: str = "pack-quantized",
    bits: int = 4,
    strategy: str = "group",
    size: int = 128,
    symmetric: bool = True,
    family: str = "mistral",
    **changes: Any,
) -> dict[str, np.ndarray]:
    model = randomised(tiny(family)).bfloat16()
    model.save_pretrained(folder)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    names = [name for name, found in model.named_modules() if isinstance(found, torch.nn.Linear)]
    for seed, name in enumerate(n for n in names if n != "lm_head"):
        shape = model.get_submodule(name).weight.shape
        own, expected[name] = compressed(*shape, layout, bits, strategy, size, symmetric, seed)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{end}": tensor for end, tensor in own.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    weights = {
        "num_bits": bits,
        "type": "int",
        "strategy": strategy,
        "symmetric": symmetric,
        "dynamic": False,
    }
    weights["group_size"] = size if strategy == "group" else None
    scheme = {
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "targets": ["Linear"],
    }
    how = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": scheme}}
    how |= {"ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed"}
    config = json.loads((folder / "config.json").read_text())
    how |= {name: value for name, value in changes.items() if name != "scheme"}
    scheme |= changes.get("scheme", {})
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    return expected


FORMS: list[dict[str, Any]] = [
    {},
    {"symmetric": False},
    {"size": 32},
    {"bits": 8, "strategy": "channel"},
    {"bits": 8, "size": 64, "symmetric": False},
    {"strategy": "channel", "symmetric": False},
    {"layout": "int-quantized", "bits": 8, "strategy": "channel"},
    {"layout": "int-quantized", "bits": 8, "strategy": "tensor"},
    {"layout": "int-quantized", "bits": 8, "size": 128, "symmetric": False},
]


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("family", ["mistral", "mpt"])
@torch.no_grad()
def test_weights(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    expected = write(tmp_path, family=family, **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    check(model, expected)
    assert model.quantization_config.source == "compressed-tensors" and model.dtype == torch.bfloat16
    model.generate(IDS, max_new_tokens=3)
    assert model.decoding_path() == "native step"


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    expected = write(tmp_path / "theirs")
    AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "own")
    check(AutoModelForCausalLM.from_pretrained(tmp_path / "own"), expected)


def test_quantised_activations_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    scheme = {"input_activations": {"num_bits": 8, "type": "int", "dynamic": True}}
    expected = write(tmp_path, "int-quantized", 8, "channel", scheme=scheme)
    check(AutoModelForCausalLM.from_pretrained(tmp_path), expected)
    assert sum("quantises activations" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format='nvfp4-pack-quantized' is not supported"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "weights must be dense"),
        ({"config_groups": {}}, "each group needs weights"),
        ({"scheme": {"weights": {"num_bits": 3, "type": "int"}}}, "num_bits=3 is not supported"),
        ({"scheme": {"weights": {"num_bits": 4, "type": "float"}}}, "type='float' is not supported"),
    ],
)
def test_layouts_that_are_not_supported(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, **options)
    with pytest.raises(UnsupportedConfig, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


STEM = "model.layers.1.mlp.down_proj."


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight_packed", lambda t: t[:, :-1].contiguous(), "which is not the layout"),
        ("weight_scale", lambda t: t[:-1].contiguous(), "which is not the layout"),
        ("weight_zero_point", lambda t: t[:-1].contiguous(), "which is not the layout"),
        ("weight_shape", lambda t: t * 2, "which is not the layout"),
        ("weight_shape", lambda _: None, "lacks a proper model.layers.1.mlp.down_proj.weight_shape"),
        ("weight_scale", lambda _: None, "but lacks model.layers.1.mlp.down_proj.weight_scale"),
        ("weight_scale", lambda t: t * float("inf"), "not finite"),
    ],
)
def test_damaged_tensors(name: str, change: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, symmetric=False)
    tensors = load_file(tmp_path / "model.safetensors")
    changed = change(tensors.pop(STEM + name))
    save_file(tensors | ({} if changed is None else {STEM + name: changed}), tmp_path / "model.safetensors")
    with pytest.raises((CheckpointError, ShapeMismatch), match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_undeclared_folders_are_recognised(tmp_path: Path) -> None:
    write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"as compressed-tensors writes them, but neither config.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
