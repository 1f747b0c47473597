"""Models that torchao quantises and transformers saves, read with torchao's own dequantised numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchao.quantization as package
import transformers
from tiny_families import fields, transformers_model

import monoblock

GROUP = {n: package.PerGroup(n) for n in (32, 64)}
INT4 = torch.int4
CONFIGS = {
    "int8": lambda: package.Int8WeightOnlyConfig(version=2),
    "int8-dynamic": lambda: package.Int8DynamicActivationInt8WeightConfig(),
    "intx8": lambda: package.IntxWeightOnlyConfig(weight_dtype=torch.int8),
    "intx4": lambda: package.IntxWeightOnlyConfig(weight_dtype=INT4, granularity=GROUP[32]),
    "intx4-asymmetric": lambda: package.IntxWeightOnlyConfig(
        weight_dtype=INT4, granularity=GROUP[64], mapping_type=package.quant_primitives.MappingType.ASYMMETRIC
    ),
    "intx4-dynamic": lambda: package.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=INT4, weight_granularity=GROUP[32]
    ),
}


@pytest.mark.parametrize("name", list(CONFIGS))
@torch.no_grad()
def test_weights(name: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 32}
    made = {**fields("mistral"), **sizes, "num_attention_heads": 4, "num_key_value_heads": 2}
    transformers_model("MistralForCausalLM", **made).bfloat16().save_pretrained(tmp_path / "plain")
    how: Any = transformers.TorchAoConfig(CONFIGS[name]())
    theirs = transformers.MistralForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=how, dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path / "packed")
    ours = monoblock.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert ours.quantization_config.source == "torchao"
    compared = 0
    for key, module in theirs.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and type(weight).__name__ in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
            found = ours.get_submodule(key).dequantize()
            # torchao rounds to bfloat16, 8 bits.
            torch.testing.assert_close(found, weight.dequantize().float(), rtol=2**-7, atol=1e-4)
            compared += 1
    assert compared == 14
    ids = torch.arange(10, 40)[None]
    expected = theirs(ids).logits.float()
    # bfloat16, and in some configs 8-bit activations with another rule: a few percent of the norm; measured 0.05.
    assert (ours(ids).logits.float() - expected).norm() < 0.1 * expected.norm()
