"""GGUF files, read by transformers' own loader and by this library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf_files
import pytest
import torch
import transformers

from monoblock import AutoModelForCausalLM

IDS = torch.arange(3, 15)[None]


def tokenizer(writer: Any) -> None:
    """transformers reads the tokenizer's metadata with the config."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefgh"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * 8])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q6_K", "IQ4_XS"])
@torch.no_grad()
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """It dequantises all weights to float32; here they are dequantised after loading."""
    gguf_files.write(tmp_path / "model.gguf", kind, tokenizer=tokenizer)
    loader: Any = transformers.AutoModelForCausalLM
    theirs = loader.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "model.gguf", dtype=torch.float32)
    if ours.quantization_config is not None:
        ours = ours.dequantize()
    found, wanted = ours(IDS).logits, theirs(IDS).logits
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4  # measured 3e-5
