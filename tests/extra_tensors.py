"""Checkpoints with more tensors than their model: a value head of TRL, and more layers than the config."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from monoblock.errors import UnexpectedKeys, UnreadKeys

VALUE_HEAD = ["v_head.summary.bias", "v_head.summary.weight"]
FEWER: dict[str, Any] = {"num_layers": 1, "attention_types": [[["global"], 1]]}  # of a GPT Neo


def with_value_head(folder: Path, target: Path) -> Path:
    """A copy of a checkpoint with TRL's value head in it."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    width = 36
    more = dict(zip(VALUE_HEAD, (np.ones(1, np.float32), np.ones((1, width), np.float32)), strict=True))
    save_file({**tensors, **more}, target / "model.safetensors", metadata={"format": "pt"})
    return target


def check_strict(cls: Any, folder: Path, tmp_path: Path, logs: Any) -> tuple[Any, Any]:
    """Loads a GPT Neo checkpoint with a value head, and into a one-layer model: an error, or with `strict=False` one
    warning and `unexpected_keys` in the loading info. Returns both models."""
    headed = with_value_head(folder, tmp_path / "headed")
    with pytest.raises(UnexpectedKeys, match=r"holds v_head.* \(and 1 more\), .*strict=False\) ignores"):
        cls.from_pretrained(headed)
    with pytest.raises(UnreadKeys, match=r"holds .*h\.1\..*strict=False\) ignores them"):
        cls.from_pretrained(folder, **FEWER)
    logs.clear()
    whole, info = cls.from_pretrained(headed, strict=False, output_loading_info=True)
    assert info["unexpected_keys"] == VALUE_HEAD
    assert info["missing_keys"] == info["mismatched_keys"] == info["error_msgs"] == []
    [warning] = [record.getMessage() for record in logs.records if record.levelname == "WARNING"]
    assert f"strict=False passes over what {headed} holds" in warning
    assert warning.endswith(": " + ", ".join(VALUE_HEAD))
    logs.clear()
    short, info = cls.from_pretrained(folder, strict=False, output_loading_info=True, **FEWER)
    assert info["unexpected_keys"]
    assert all(".h.1." in name or ".h.2." in name for name in info["unexpected_keys"])
    assert info["missing_keys"] == []
    assert sum(record.levelname == "WARNING" for record in logs.records) == 1
    assert short.config.num_layers == 1
    with pytest.raises(ValueError, match="lacks"):  # missing tensors stay an error
        cls.from_pretrained(folder, strict=False, num_layers=4, attention_types=[[["global"], 4]])
    assert cls.from_pretrained(folder, output_loading_info=True)[1]["unexpected_keys"] == []
    return whole, short
