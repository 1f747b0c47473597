"""Matrices that MLX itself quantises and saves, read with MLX's own dequantised numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import fields, monoblock_model

import monoblock

mx: Any = pytest.importorskip("mlx.core")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_weights(bits: int, group: int, dtype: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}
    model = monoblock_model("MistralForCausalLM", **{**fields("mistral"), **sizes, "num_attention_heads": 2})
    model.save_pretrained(tmp_path)
    tensors: dict[str, Any] = mx.load(str(tmp_path / "model.safetensors"))
    expected: dict[str, np.ndarray] = {}
    for name, values in list(tensors.items()):
        values = tensors[name] = values.astype(getattr(mx, dtype))
        if values.ndim == 2:
            stem = name.removesuffix(".weight")
            words, scales, biases = mx.quantize(values, group_size=group, bits=bits)
            tensors |= {name: words, f"{stem}.scales": scales, f"{stem}.biases": biases}
            wide = (x.astype(mx.float32) for x in (scales, biases))
            expected[stem] = np.array(mx.dequantize(words, *wide, group_size=group, bits=bits))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors, metadata={"format": "mlx"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization"] = config["quantization_config"] = {"group_size": group, "bits": bits}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = monoblock.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert found.quantization_config.source == "mlx"
    for stem, weight in expected.items():
        # MLX may multiply and add in one step, which rounds once: a unit of float32.
        np.testing.assert_allclose(
            found.get_submodule(stem).dequantize().numpy(), weight, rtol=3e-7, atol=3e-7, err_msg=stem
        )
    ids = torch.arange(3, 20)[None]
    assert found.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 21)
