"""Folders that bitsandbytes quantised: 4 bits (nf4, fp4, double quantisation) and 8 bits; damaged files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_gptq_awq import tiny
from tiny_families import randomised

from monoblock import AutoModelForCausalLM
from monoblock.backends.pytorch.quantization.modules import QuantizedMatrix
from monoblock.checkpoint import casts
from monoblock.checkpoint.bnb_tensors import FourBitTensors
from monoblock.checkpoint.weights import StateTensors
from monoblock.cli.info import describe
from monoblock.cli.options import DownloadOptions
from monoblock.errors import CheckpointError, ShapeMismatch, UnsupportedConfig

functional = pytest.importorskip("bitsandbytes.functional")
torch.set_num_threads(1)

IDS = torch.arange(3, 15)[None]
LAST = "model.layers.1.mlp.down_proj."
FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "load_in_8bit": False}
EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}


def write(
    folder: Path, how: dict[str, Any] | None, kind: str = "nf4", family: str = "mistral", **options: Any
) -> dict[str, torch.Tensor]:
    """Write a folder that bitsandbytes quantised; returns its dequantised weights by module. `kind`: nf4, fp4, int8."""
    model = randomised(tiny(family)).bfloat16()
    model.save_pretrained(folder)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        weight = module.weight.detach()
        if kind == "int8":
            codes, scb, _ = functional.int8_vectorwise_quant(weight.half())
            tensors |= {f"{name}.weight": codes, f"{name}.SCB": scb}
            tensors[f"{name}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
            expected[name] = functional.int8_vectorwise_dequant(codes, scb)
            continue
        codes, state = functional.quantize_4bit(weight, quant_type=kind, **options)
        tensors[f"{name}.weight"] = codes
        parts = state.as_dict(packed=True).items()
        tensors |= {f"{name}.weight.{end}": tensor.clone() for end, tensor in parts}
        expected[name] = functional.dequantize_4bit(codes, state)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    declared = {} if how is None else {"quantization_config": how}
    (folder / "config.json").write_text(json.dumps(config | declared))
    return expected


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("nf4", {"blocksize": 64, "compress_statistics": True}),
        ("nf4", {"blocksize": 64, "compress_statistics": False}),
        ("fp4", {"blocksize": 128, "compress_statistics": True}),
        ("fp4", {"blocksize": 64, "quant_storage": torch.bfloat16}),
    ],
)
@pytest.mark.parametrize("family", ["mistral", "mpt"])
@torch.no_grad()
def test_four_bits(
    family: str, kind: str, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = write(tmp_path, FOUR | {"bnb_4bit_quant_type": kind}, kind, family, **options)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).weight, weight), name
    assert not any(info.values()) and not model.is_quantized
    said = [record.getMessage() for record in caplog.records]
    assert sum(f"{len(expected)} matrices in 4 bits of bitsandbytes" in text for text in said) == 1
    model.generate(IDS, max_new_tokens=3)
    assert model.decoding_path() == "native step"
    assert f"4 bits ({kind}) by" in describe(str(tmp_path), DownloadOptions())["quantization"]["summary"]


@pytest.mark.parametrize(
    ("shape", "block"), [((3, 1), 64), ((5, 7), 64), ((1030, 2304), 64), ((1100, 2048), 4096)]
)
def test_sizes_beyond_a_block_and_a_chunk(shape: tuple[int, int], block: int) -> None:
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=random).bfloat16()
    codes, state = functional.quantize_4bit(
        weight, quant_type="nf4", blocksize=block, compress_statistics=True
    )
    parts = state.as_dict(packed=True).items()
    tensors = StateTensors({"x.weight": codes} | {f"x.weight.{end}": tensor for end, tensor in parts})
    inner = state.state2
    outer = inner.absmax.repeat_interleave(inner.blocksize)[: len(state.absmax)]
    scales = inner.code[state.absmax.long()] * outer + state.offset
    found = torch.stack((codes.flatten() >> 4, codes.flatten() & 15), 1).flatten()[: weight.numel()].long()
    expected = (state.code[found] * scales.repeat_interleave(block)[: len(found)]).bfloat16()
    assert torch.equal(FourBitTensors(tensors, "pt").tensor("x.weight"), expected.reshape(shape))
    arrays = StateTensors({name: tensors.tensor(name).numpy() for name in tensors})
    found = casts.widened(FourBitTensors(arrays, "np").tensor("x.weight"))
    assert torch.equal(torch.from_numpy(found).reshape(-1), expected.float())


def test_an_unknown_kind(tmp_path: Path) -> None:
    write(tmp_path / "a", FOUR)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    file = tmp_path / "a" / "model.safetensors"
    save_file({name.replace("__nf4", "__nf5"): tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(CheckpointError, match="in 4 bits, but no"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("family", ["mistral", "mpt"])
@torch.no_grad()
def test_eight_bits_stay_packed(family: str, tmp_path: Path) -> None:
    expected = write(tmp_path / "theirs", EIGHT, "int8", family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "own")
    for loaded in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "own")):
        for name, weight in expected.items():
            module = loaded.get_submodule(name)
            assert isinstance(module, QuantizedMatrix), name
            # bitsandbytes multiplies by 1/127, in another order.
            torch.testing.assert_close(module.dequantize(), weight, rtol=4e-7, atol=0)
    assert model.quantization_config.source == "bitsandbytes"
    model.generate(IDS, max_new_tokens=3)
    assert model.decoding_path() == "native step"
    summary = describe(str(tmp_path / "theirs"), DownloadOptions())["quantization"]["summary"]
    assert summary.startswith("by bitsandbytes, kept as it is; most matrices int8")


def test_the_threshold_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write(tmp_path, EIGHT, "int8")
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum("llm_int8_threshold has no effect" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (FOUR | {"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type='int4' is not supported"),
        (FOUR | {"load_in_8bit": True}, "either it or load_in_8bit must be true"),
        (EIGHT | {"llm_int8_has_fp16_weight": True}, "weights must be int8"),
        (FOUR | {"rotation": 3}, "unknown field 'rotation'"),
    ],
)
def test_declarations_that_are_not_supported(how: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, how)
    with pytest.raises(UnsupportedConfig, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def _state(**changes: Any) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        fields = json.loads(bytes(tensor.tolist())) | changes
        return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)

    return change


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (STATE, lambda _: None, "in 4 bits, but no"),
        (STATE, lambda t: t[:-1].contiguous(), "it is no JSON"),
        (STATE, lambda _: torch.tensor([91, 93], dtype=torch.uint8), "no JSON object"),
        (STATE, lambda _: torch.full((5000,), 32, dtype=torch.uint8), "no short JSON text"),
        (STATE, _state(blocksize=63), "no proper state"),
        (STATE, _state(blocksize=[64]), "no proper state"),
        (STATE, _state(shape=[256, -384]), "no proper state"),
        (STATE, _state(shape=[256, 385]), "bytes, but 256 x 385 weights"),
        (STATE, _state(shape=[128, 768]), "down_proj"),
        (STATE, _state(quant_type="fp4"), "no proper state"),
        (STATE, _state(nested_blocksize=0), "nested_blocksize=0"),
        (STATE, _state(nested_offset=float("nan")), "not finite"),
        (STATE, _state(nested_offset=10**400), "not finite"),
        ("weight", lambda _: None, f"but lacks {LAST}weight"),
        ("weight", lambda t: t[:-1].contiguous(), "weights in 4 bits have"),
        ("weight.absmax", lambda _: None, "but lacks"),
        ("weight.absmax", lambda t: t[:-1].contiguous(), "the matrix needs U8"),
        ("weight.quant_map", lambda t: t[:-1].contiguous(), r"the matrix needs F32 \[16\]"),
        ("weight.quant_map", lambda t: t * float("inf"), "not finite"),
        ("weight.nested_absmax", lambda _: None, "which its 4-bit weights need"),
        ("weight.nested_absmax", lambda t: t * float("nan"), "not finite"),
        ("weight.nested_quant_map", lambda t: t[:-1].contiguous(), r"the matrix needs F32 \[256\]"),
    ],
)
def test_damaged_four_bits(name: str, change: Any, message: str, tmp_path: Path) -> None:
    how = FOUR | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    write(tmp_path, how, compress_statistics=True)
    _damage(tmp_path, name, change, message)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("SCB", lambda t: t[:-1].contiguous(), "which is not the layout of bitsandbytes"),
        ("SCB", lambda t: t * float("nan"), "not finite"),
        ("weight", lambda t: t.int(), "which is not the layout"),
        ("weight", lambda t: t[:, :-1].contiguous(), "has 383 inputs, but the model needs 384"),
        ("weight_format", lambda t: t + 1, "a layout of other kernels"),
        ("weight_format", lambda t: t.float(), "one number of U8"),
    ],
)
def test_damaged_eight_bits(name: str, change: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, EIGHT, "int8")
    _damage(tmp_path, name, change, message)


def _damage(folder: Path, name: str, change: Any, message: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors.pop(LAST + name))
    save_file(tensors | ({} if changed is None else {LAST + name: changed}), folder / "model.safetensors")
    with pytest.raises((CheckpointError, ShapeMismatch), match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_declarations_that_do_not_fit_the_tensors(tmp_path: Path) -> None:
    write(tmp_path / "a", None)
    with pytest.raises(CheckpointError, match=r"as bitsandbytes \(4 bits\) writes them, but neither"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    write(tmp_path / "b", FOUR, "int8")
    with pytest.raises(
        CheckpointError, match=r"declares bitsandbytes \(4 bits\), .* bitsandbytes \(8 bits\)"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "b")
