"""Folders of GPTQ and AWQ: weights, what is kept packed, declarations, damaged files."""

from __future__ import annotations

import json
import logging
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_files import Packed
from safetensors.torch import load_file, save_file
from tiny_families import randomised

import monoblock
from monoblock import AutoModelForCausalLM
from monoblock.backends.pytorch.quantization.modules import QuantizedMatrix
from monoblock.conversion.convert import Options, convert
from monoblock.errors import CheckpointError, ShapeMismatch, UnsupportedConfig

torch.set_num_threads(1)

IDS = torch.arange(3, 15)[None]
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "desc_act": False,
    "sym": True,
    "checkpoint_format": "gptq",
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def tiny(family: str) -> Any:
    if family == "mpt":
        sizes = {"d_model": 256, "n_heads": 4, "n_layers": 2, "vocab_size": 40, "expansion_ratio": 2}
        return monoblock.MptForCausalLM(monoblock.MptConfig(**sizes))
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None}
    return monoblock.MistralForCausalLM(monoblock.MistralConfig(**sizes, **heads))


def write(
    folder: Path,
    how: dict[str, Any] | None,
    *,
    family: str = "mistral",
    biases: bool = False,
    plain: tuple[str, ...] = (),
    beside: str | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Write a folder with random quantised matrices in the blocks; returns their weights by module. `plain`: modules
    that stay unquantised; `beside`: the file with the declaration, instead of config.json."""
    model = randomised(tiny(family)).half()
    model.save_pretrained(folder)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    tool = (how or GPTQ).get("quant_method", "gptq")
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for seed, name in enumerate(n for n in names if n != "lm_head" and not n.endswith(plain or ("-",))):
        packed = Packed(tool, *model.get_submodule(name).weight.shape, seed=seed, **options)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{end}": tensor for end, tensor in packed.tensors.items()}
        if biases:
            tensors[f"{name}.bias"] = torch.zeros(packed.weight.shape[0], dtype=torch.float16)
        expected[name] = packed.weight
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if how is not None and beside is None:
        config["quantization_config"] = how
    if beside is not None:
        (folder / beside).write_text(json.dumps(how))
    (folder / "config.json").write_text(json.dumps(config))
    return expected


def check(model: Any, expected: dict[str, np.ndarray], bits: Fraction | None = None) -> None:
    """The matrices are packed, with these weights to the bit; `bits`: those of a weight in memory."""
    for name, weight in expected.items():
        module = model.get_submodule(name)
        assert isinstance(module, QuantizedMatrix), name
        assert torch.equal(module.dequantize(), torch.from_numpy(weight)), name
        assert bits is None or module.quantized.nbytes * 8 == bits * weight.size, name


FORMS = [
    ("gptq", {}, {"symmetric": True}),
    ("gptq", {"sym": False}, {}),
    ("gptq", {"sym": False, "checkpoint_format": "gptq_v2"}, {"version": 2}),
    ("gptq", {"group_size": 32}, {"group": 32, "symmetric": True}),
    ("gptq", {"group_size": 64, "sym": False}, {"group": 64, "scales": torch.bfloat16}),
    ("gptq", {"group_size": -1}, {"group": -1, "symmetric": True}),
    ("gptq", {"group_size": 256, "sym": False}, {"group": 256}),
    ("gptq", {"bits": 8}, {"bits": 8, "symmetric": True}),
    ("gptq", {"bits": 8, "sym": False, "group_size": 32}, {"bits": 8, "group": 32}),
    ("awq", {}, {}),
    ("awq", {"group_size": 64}, {"group": 64}),
]


@pytest.mark.parametrize(("tool", "declared", "options"), FORMS)
@pytest.mark.parametrize("family", ["mistral", "mpt"])
@torch.no_grad()
def test_weights(
    family: str, tool: str, declared: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    expected = write(tmp_path, (GPTQ if tool == "gptq" else AWQ) | declared, family=family, **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    # The code, the group's scale, and its zero point where the file may have several.
    each = (32 if "scales" in options else 16) + (0 if options.get("symmetric") else 8)
    group = options.get("group", 128)
    bits = options.get("bits", 4) + Fraction(each, group if group in (32, 64) else 128)
    check(model, expected, bits)
    assert model.dtype == torch.bfloat16 and model.quantization_config.source == tool
    asked = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(IDS, **asked)
    assert model.decoding_path() == "native step"
    wanted = model.dequantize()(out.sequences).logits[:, IDS.shape[1] - 1 : -1].float()
    found = torch.stack(out.logits, 1).float()
    assert float((found - wanted).norm() / wanted.norm()) < 0.05  # bfloat16 and activations in 8 bits


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    expected = write(tmp_path / "gptq", GPTQ | {"sym": False})
    AutoModelForCausalLM.from_pretrained(tmp_path / "gptq").save_pretrained(tmp_path / "own")
    tensors = load_file(tmp_path / "own/model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.weight.low"].dtype == torch.uint8
    convert(tmp_path / "own", tmp_path / "plain", Options(dtype="float32"))
    plain = load_file(tmp_path / "plain/model.safetensors")
    for name, weight in expected.items():
        assert torch.equal(plain[f"{name}.weight"], torch.from_numpy(weight)), name
    stored = json.loads((tmp_path / "own/config.json").read_text())["quantization_config"]
    assert stored["source"] == "gptq" and stored["method"] == "monoblock"
    check(AutoModelForCausalLM.from_pretrained(tmp_path / "own"), expected)


@pytest.mark.parametrize(("bits", "middle"), [(4, 8), (8, 128)])
def test_zero_points_of_all_codes(bits: int, middle: int, tmp_path: Path) -> None:
    """GPTQ's first format stores zero points less 1: the largest is 16, or 256, which no byte holds: such a matrix of
    8 bits, and one that is fused with it, have lows."""
    expected = write(tmp_path, GPTQ | {"bits": bits, "sym": False}, bits=bits, symmetric=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.qzeros"].fill_(-1)  # all bits
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    scale = tensors[f"{name}.scales"].float().T.repeat_interleave(128, 1).numpy()
    expected[name] = expected[name] + (middle - (1 << bits)) * scale
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    check(model, expected)
    for other in expected:
        packed = model.get_submodule(other).quantized
        fused = other in (name, name.replace("up_proj", "gate_proj"))
        assert packed.zero_points == (bits == 4 or not fused) and packed.low is not None, other
    model.generate(IDS, max_new_tokens=2)
    assert model.decoding_path() == "native step"


def test_act_order_is_dequantised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = write(tmp_path, GPTQ | {"desc_act": True, "sym": False}, act_order=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    [record] = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "14 matrices (model.layers.0." in record.getMessage() and model.quantization_config is None
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).weight, torch.from_numpy(weight).bfloat16()), name


def test_matrices_that_stay_unquantised(tmp_path: Path) -> None:
    """A fused matrix beside one that is not quantised is dequantised; another stays packed."""
    expected = write(tmp_path, AWQ | {"modules_to_not_convert": ["k_proj"]}, plain=("k_proj",))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    attention = model.model.layers[0].self_attn
    wanted = torch.from_numpy(expected["model.layers.0.self_attn.q_proj"]).bfloat16()
    assert torch.equal(attention.q_proj.weight, wanted) and isinstance(attention.o_proj, QuantizedMatrix)
    assert model.decoding_path() == "native step"


def test_biases_of_zeros_are_left_out(tmp_path: Path) -> None:
    expected = write(tmp_path, GPTQ, biases=True, symmetric=True)
    check(AutoModelForCausalLM.from_pretrained(tmp_path), expected)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"][3] = 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.bias"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------- declarations


@pytest.mark.parametrize(
    ("file", "how", "options"),
    [
        ("quantize_config.json", {k: v for k, v in GPTQ.items() if k != "quant_method"}, {"symmetric": True}),
        ("quant_config.json", {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}, {}),
    ],
)
def test_declared_in_a_file_of_the_tool(file: str, how: dict[str, Any], options: Any, tmp_path: Path) -> None:
    tool = "awq" if file.startswith("quant_") else "gptq"
    expected = write(tmp_path, {"quant_method": tool} | how, beside=file, **options)
    (tmp_path / file).write_text(json.dumps(how))
    check(AutoModelForCausalLM.from_pretrained(tmp_path), expected)


@pytest.mark.parametrize("tool", ["gptq", "awq"])
def test_undeclared_folders_are_recognised(tool: str, tmp_path: Path) -> None:
    write(tmp_path, {"quant_method": tool}, beside="x.json")
    with pytest.raises(CheckpointError, match=f"as {tool.upper()} writes them, but neither config.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    write(tmp_path, GPTQ if tool == "awq" else AWQ)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = AWQ if tool == "awq" else GPTQ
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = "GPTQ" if tool == "awq" else "AWQ"
    with pytest.raises(CheckpointError, match=f"declares {tool}, but the tensors are those of {other}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (GPTQ | {"bits": 3}, "bits=3 is not supported for gptq"),
        ({k: v for k, v in GPTQ.items() if k != "bits"}, "bits=None is not supported"),
        ({k: v for k, v in GPTQ.items() if k != "group_size"}, "group_size=None is not supported"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not supported"),
        (GPTQ | {"dynamic": {"x": {}}}, "settings by module"),
        (GPTQ | {"sym": "yes"}, "sym='yes' is not supported"),
        (AWQ | {"version": "gemv"}, "version='gemv' is not supported for awq"),
        (AWQ | {"zero_point": False}, "symmetric AWQ"),
        (AWQ | {"bits": 8}, "bits=8 is not supported for awq"),
    ],
)
def test_layouts_that_are_not_supported(how: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, how)
    with pytest.raises(UnsupportedConfig, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_default_of_the_format_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    expected = write(tmp_path, {k: v for k, v in GPTQ.items() if k != "checkpoint_format"}, symmetric=True)
    check(AutoModelForCausalLM.from_pretrained(tmp_path), expected)
    assert sum("lacks checkpoint_format" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("tool", ["gptq", "awq"])
def test_convert_dequantises(tool: str, tmp_path: Path) -> None:
    """Into a folder in float32, to the bit, or in bfloat16 by default; its config declares nothing."""
    expected = write(tmp_path / "in", GPTQ if tool == "gptq" else AWQ, symmetric=tool == "gptq")
    convert(tmp_path / "in", tmp_path / "out", Options(dtype="float32", check=True))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.quantization_config is None and model.dtype == torch.float32
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).weight, torch.from_numpy(weight)), name
    assert convert(tmp_path / "in", tmp_path / "half").dtype == "bfloat16"
    assert "quantization_config" not in (tmp_path / "half" / "config.json").read_text()


# ---------------------------------------------------------------------------- damaged files


def changed(folder: Path, name: str, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    if tensors[name] is None:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


STEM = "model.layers.1.mlp.down_proj."


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qweight", lambda t: t[:-1].contiguous(), "must name one of 3 groups for each of 376 inputs"),
        ("qzeros", lambda t: t[:, :-1].contiguous(), "which is not the layout of gptq"),
        ("qweight", lambda t: t.long(), "which is not the layout of gptq"),
        ("scales", lambda _: None, "but lacks model.layers.1.mlp.down_proj.scales"),
        ("scales", lambda t: t.flatten(), "are no matrices"),
        ("scales", lambda t: t * float("nan"), "not finite"),
        ("qzeros", lambda t: t + 1, "zero points other than 8"),
        ("g_idx", lambda t: t + 100, "must name one of 3 groups"),
        ("g_idx", lambda t: t[:-1].contiguous(), "must name one of 3 groups"),
    ],
)
def test_damaged_tensors(name: str, change: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, GPTQ, symmetric=True)
    changed(tmp_path, STEM + name, change)
    with pytest.raises((CheckpointError, ShapeMismatch), match=message) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
