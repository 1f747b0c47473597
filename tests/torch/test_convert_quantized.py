"""`monoblock convert` of quantised folders and files: dequantised matrix by matrix, without PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_gguf_out
import torch
from test_gptq_awq import tiny
from tiny_families import randomised

import monoblock
from monoblock import AutoModelForCausalLM, AutoTokenizer
from monoblock.conversion.convert import Options, convert
from monoblock.conversion.gguf import GgufOptions, convert_to_gguf
from monoblock.errors import CheckpointError

torch.set_num_threads(1)


def equal(found: Any, expected: Any) -> bool:
    one, two = found.state_dict(), expected.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k].float(), two[k].float()) for k in one)


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("family", ["mistral", "mpt"])
def test_folders_of_this_library(family: str, bits: str, tmp_path: Path) -> None:
    """Matrices of 256 and of 384 inputs and, in MPT, fused ones."""
    randomised(tiny(family)).save_pretrained(tmp_path / "plain")
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=bits, dtype="float32"
    )
    packed.save_pretrained(tmp_path / "packed")
    result = convert(tmp_path / "packed", tmp_path / "new", Options(dtype="float32", check=True))
    assert result.comparison is not None and result.comparison.difference == 0
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "new"), packed.dequantize())
    assert "quantization_config" not in json.loads((tmp_path / "new" / "config.json").read_text())


def test_inputs_that_are_padded(tmp_path: Path) -> None:
    """72 inputs, of 128 with padding."""
    sizes = {"hidden_size": 72, "intermediate_size": 104, "num_hidden_layers": 1, "vocab_size": 40}
    config = monoblock.MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    randomised(monoblock.MistralForCausalLM(config)).save_pretrained(tmp_path / "plain")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config="int4")
    packed.save_pretrained(tmp_path / "packed")
    convert(tmp_path / "packed", tmp_path / "new", Options(dtype="float32"))
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "new"), packed.dequantize())


def test_matrices_that_files_store_transposed(tmp_path: Path) -> None:
    """GPT-1's Conv1D, among them a square one."""
    config = monoblock.OpenAIGPTConfig(n_embd=64, n_layer=1, n_head=2, vocab_size=40, n_positions=32)
    randomised(monoblock.OpenAIGPTLMHeadModel(config)).save_pretrained(tmp_path / "plain")
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config="int8", dtype="float32"
    )
    packed.save_pretrained(tmp_path / "packed")
    convert(tmp_path / "packed", tmp_path / "new", Options(dtype="float32", check=True))
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "new"), packed.dequantize())


def test_the_lossless_format_is_refused(tmp_path: Path) -> None:
    randomised(tiny("mistral")).bfloat16().save_pretrained(tmp_path / "plain")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config="lossless")
    packed.save_pretrained(tmp_path / "packed")
    with pytest.raises(CheckpointError, match="lossless format of 12 bits"):
        convert(tmp_path / "packed", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "bf16"])
def test_gguf_to_a_folder_and_to_gguf(kind: str, tmp_path: Path) -> None:
    """With the tokenizer that the file contains; q8_0 of q8_0 is the same file content."""
    test_gguf_out.save_mistral(tmp_path / "plain")
    convert_to_gguf(tmp_path / "plain", tmp_path / "a.gguf", GgufOptions(kind=kind))
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "a.gguf", dtype="float32")
    if source.quantization_config is not None:
        source.dequantize()
    convert(tmp_path / "a.gguf", tmp_path / "new", Options(dtype="float32"))
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "new"), source)
    one, two = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("a.gguf", "new"))
    for text in test_gguf_out.TEXTS:
        assert one(text)["input_ids"] == two(text)["input_ids"]
    assert two.chat_template == test_gguf_out.TEMPLATE
    assert (tmp_path / "new" / "generation_config.json").exists()
    assert "bfloat16" in convert(tmp_path / "a.gguf", tmp_path / "half").dtype
    convert_to_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", GgufOptions(kind="q8_0"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b.gguf", dtype="float32").dequantize()
    for name, weight in source.state_dict().items():
        bound = 0 if kind == "q8_0" else weight.float().abs().max() / 127  # half a step, and rounding to fp16
        assert (again.state_dict()[name].float() - weight.float()).abs().max() <= bound, name


def test_a_quantised_folder_to_gguf(tmp_path: Path) -> None:
    test_gguf_out.save_mistral(tmp_path / "plain")
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config="int4", dtype="float32"
    )
    packed.save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "packed")
    convert_to_gguf(tmp_path / "packed", tmp_path / "a.gguf", GgufOptions(kind="q8_0"))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "a.gguf", dtype="float32").dequantize()
    found = found.state_dict()
    for name, weight in packed.dequantize().state_dict().items():
        if weight.dim() == 2:
            expected = test_gguf_out.expected(weight.float(), "q8_0")
            assert torch.equal(found[name].float(), expected), name
