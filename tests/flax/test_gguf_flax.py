"""GGUF files in JAX: unquantised ones are read, quantised ones refused."""

from __future__ import annotations

from pathlib import Path

import gguf_files
import numpy as np
import pytest

from monoblock import FlaxAutoModelForCausalLM
from monoblock.errors import CheckpointError


def test_unquantised_and_quantised_files(tmp_path: Path) -> None:
    expected = gguf_files.write(tmp_path / "model.gguf", "F32")
    model = FlaxAutoModelForCausalLM.from_pretrained(tmp_path / "model.gguf")
    kernel = model.params["model"]["layers"]["1"]["mlp"]["down_proj"]["kernel"]
    np.testing.assert_array_equal(np.asarray(kernel).T, expected["blk.1.ffn_down.weight"])
    q = np.asarray(model.params["model"]["layers"]["1"]["self_attn"]["q_proj"]["kernel"]).T
    stored = expected["blk.1.attn_q.weight"].reshape(4, 32, 2, -1)
    np.testing.assert_array_equal(q, stored.swapaxes(1, 2).reshape(q.shape))
    gguf_files.write(tmp_path / "q8.gguf", "Q8_0")
    with pytest.raises(CheckpointError, match="which only the PyTorch classes read"):
        FlaxAutoModelForCausalLM.from_pretrained(tmp_path / "q8.gguf")
