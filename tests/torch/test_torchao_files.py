"""Folders of torchao's integer tensors, made by hand from the layout that transformers saves, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_gptq_awq import check, tiny
from tiny_families import randomised

from monoblock import AutoModelForCausalLM
from monoblock.cli.info import describe
from monoblock.cli.options import DownloadOptions
from monoblock.errors import CheckpointError, ShapeMismatch, UnsupportedConfig

torch.set_num_threads(1)

IDS = torch.arange(3, 15)[None]
STEM = "model.layers.0.mlp.down_proj"


def write(
    folder: Path,
    *,
    kind: str = "IntxUnpackedToInt8Tensor",
    bits: int = 8,
    group: int | None = None,
    zeros: bool = False,
    scales: torch.dtype = torch.bfloat16,
) -> dict[str, np.ndarray]:
    """A tiny Mistral with the matrices of the blocks quantised. `group` None: a whole row."""
    model = randomised(tiny("mistral")).bfloat16()
    model.save_pretrained(folder)
    tensors, expected, metadata = load_file(folder / "model.safetensors"), {}, {"format": "pt"}
    random, limit = np.random.default_rng(0), 1 << bits - 1
    for name, found in model.named_modules():
        if not isinstance(found, torch.nn.Linear) or name == "lm_head":
            continue
        outputs, inputs = found.weight.shape
        size = group or inputs
        codes = random.integers(-limit, limit, (outputs, inputs)).astype(np.int8)
        zero = np.zeros((outputs, inputs // size), np.int8)
        if zeros:
            zero = random.integers(-limit, limit, zero.shape).astype(np.int8)
        scale = torch.from_numpy(random.uniform(0.5, 1, zero.shape) / (8 * limit)).to(scales)
        values = scale.float().numpy()
        wide, less = (np.repeat(x, size, axis=1) for x in (values, zero.astype(np.float32)))
        expected[name] = wide * (codes.astype(np.float32) - less)
        del tensors[f"{name}.weight"]
        stored = {"qdata": codes, "scale": scale, "zero_point": zero}
        tensors |= {f"{name}._weight_{k}": torch.as_tensor(x) for k, x in stored.items()}
        data = {"block_size": [1, size], "target_dtype": {"_type": "torch.dtype", "_data": f"int{bits}"}}
        metadata[f"{name}.weight"] = json.dumps({"_type": kind, "_data": data})
    save_file(tensors, folder / "model.safetensors", metadata)
    config = json.loads((folder / "config.json").read_text())
    way: dict[str, Any] = {"granularity": {"_type": "PerRow", "_data": {"dim": -1}}}
    if group:
        way = {"granularity": {"_type": "PerGroup", "_data": {"group_size": group}}}
    data = {**way, "weight_dtype": {"_data": f"int{bits}", "_type": "torch.dtype"}}
    quant = {"default": {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": data}}
    how = {"quant_method": "torchao", "quant_type": quant, "modules_to_not_convert": None}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    return expected


FORMS: list[dict[str, Any]] = [
    {},
    {"kind": "Int8Tensor", "scales": torch.float32},
    {"group": 32},
    {"group": 128, "scales": torch.float16},
    {"group": 64, "zeros": True},
    {"bits": 4, "group": 32},
    {"bits": 4, "group": 64, "scales": torch.float16},
    {"bits": 4, "group": 32, "zeros": True, "scales": torch.float32},
    {"bits": 4},
    {"bits": 2, "group": 32},
    {"bits": 6, "group": 64},
]


@pytest.mark.parametrize("options", FORMS)
@torch.no_grad()
def test_weights(options: dict[str, Any], tmp_path: Path) -> None:
    expected = write(tmp_path / "a", **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    check(model, expected)
    assert model.quantization_config.source == "torchao"
    assert model.quantization_config.bits == (4 if options.get("bits", 8) <= 4 else 8)
    assert model.quantization_config.group_size == (options.get("group") or 128)
    tokens = model.generate(IDS, max_new_tokens=3)
    assert "torchao" in describe(str(tmp_path / "a"), DownloadOptions())["quantization"]["summary"]
    model.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    check(again, expected)
    assert torch.equal(again.generate(IDS, max_new_tokens=3), tokens)


def test_zero_points_beyond_the_codes(tmp_path: Path) -> None:
    """An integer of 4 bits whose zero point is below -8 has no byte for it: that matrix, and those that are fused with
    it, have lows; others have zero points."""
    expected = write(tmp_path, bits=4, group=128, zeros=True, scales=torch.float16)
    name = "model.layers.0.mlp.up_proj"

    def lower(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}._weight_zero_point"] -= 30
        scale = tensors[f"{name}._weight_scale"].float().repeat_interleave(128, 1)
        expected[name] = (torch.from_numpy(expected[name]) + 30 * scale).numpy()

    changed(tmp_path, lower)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    check(model, expected)
    for other in expected:
        packed = model.get_submodule(other).quantized
        fused = other in (name, name.replace("up_proj", "gate_proj"))
        assert packed.zero_points != fused, other


def test_groups_that_no_format_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Groups of 8 are dequantised, with one warning."""
    expected = write(tmp_path, group=8, zeros=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert caplog.text.count("dequantised to bfloat16") == 1
    found = model.get_submodule(STEM).weight
    assert torch.equal(found, torch.from_numpy(expected[STEM]).bfloat16())


def changed(folder: Path, tensor: Any = None, note: str | None = None, drop: bool = False) -> None:
    """Change the file's tensors by a function, or its metadata of one matrix."""
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata())
    if note is not None:
        metadata[f"{STEM}.weight"] = note
    if drop:
        del metadata[f"{STEM}.weight"]
    tensors = load_file(file)
    if tensor is not None:
        tensor(tensors)
    save_file(tensors, file, metadata)


def described(kind: str = "Int8Tensor", **data: Any) -> str:
    return json.dumps({"_type": kind, "_data": {"block_size": [1, 384], **data}})


@pytest.mark.parametrize(
    ("tensor", "note", "error", "words"),
    [
        (lambda t: t.pop(f"{STEM}._weight_scale"), None, CheckpointError, "lacks .*_weight_scale"),
        (lambda t: t[f"{STEM}._weight_scale"].fill_(float("inf")), None, CheckpointError, "not finite"),
        (
            lambda t: t.update({f"{STEM}._weight_qdata": t[f"{STEM}._weight_qdata"].view(torch.uint8)}),
            None,
            ShapeMismatch,
            "qdata U8",
        ),
        (None, described(block_size=[1, 32]), ShapeMismatch, "groups of 32"),
        (None, described(block_size=[2, 32]), UnsupportedConfig, "block_size"),
        (None, described("Int4Tensor"), UnsupportedConfig, "Int4Tensor"),
        (None, described(target_dtype={"_data": "uint4"}), UnsupportedConfig, "target_dtype"),
        (None, described(target_dtype={"_data": "int4"}), CheckpointError, "4 bits"),
        (None, "{", CheckpointError, "does not describe"),
    ],
    ids=["missing", "inf", "dtype", "groups", "block", "class", "target", "range", "json"],
)
def test_damage_and_refusals(
    tensor: Any, note: str | None, error: type[Exception], words: str, tmp_path: Path
) -> None:
    write(tmp_path)
    changed(tmp_path, tensor, note)
    with pytest.raises(error, match=words) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert STEM in str(caught.value) and "\n" not in str(caught.value)


def test_without_metadata_or_with_unknown_fields(tmp_path: Path) -> None:
    write(tmp_path)
    changed(tmp_path, drop=True)
    with pytest.raises(CheckpointError, match="does not describe"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["sparsity"] = "2:4"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedConfig, match="sparsity"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
