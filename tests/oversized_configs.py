"""Configs that imply larger tensors than the checkpoint has are refused before allocation, in any framework."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from monoblock import MistralConfig
from monoblock.checkpoint.keymap import KeyMap
from monoblock.checkpoint.weights import stored_shapes
from monoblock.errors import MissingKeys, ShapeMismatch
from monoblock.families import family
from monoblock.tree import parameters

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 20,
}  # fmt: skip
MAX_GROWTH = 512 << 20  # bytes of memory during a refusal; the configs imply 128 GiB and more


def folder(path: Path, **fields: Any) -> Path:
    """A complete tiny checkpoint whose config.json has other values for `fields`."""
    config = MistralConfig(**SIZES)
    keymap: KeyMap = family("mistral").keymap(config, "causal")
    tensors: dict[str, Any] = {}
    for canonical, shape in parameters(config.to_spec(), config.to_head("causal")).items():
        source = keymap.source(canonical)
        for name, one in zip(source.names, stored_shapes(source.op, shape), strict=True):
            tensors[name] = np.zeros(one, np.float32)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "mistral", **SIZES, **fields}))
    return path


def check(cls: Any, path: Path) -> None:
    """A larger vocabulary and more layers."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        ShapeMismatch, match=r"embed_tokens.weight .* is \[50, 16\] .* implies \[2147483648, 16\]"
    ):
        cls.from_pretrained(folder(path, vocab_size=2**31))
    with pytest.raises(MissingKeys, match=r"lacks model.layers.1.input_layernorm.weight"):
        cls.from_pretrained(folder(path, num_hidden_layers=1000))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MAX_GROWTH
