"""Conversions that fail raise and leave no files; and conversion without PyTorch."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import upstream_releases
from helpers import model, randomised
from safetensors.torch import load_file, save_file
from upstream_releases import mistral, names, saved

import monoblock
from monoblock.checkpoint.journal import STAGE
from monoblock.conversion.convert import FORMATS, Options, convert

# ------------------------------------------------------------------ whole or not at all


def test_interruption_leaves_no_files(tmp_path: Path) -> None:
    source = saved(mistral(), tmp_path / "a")

    def stop(done: int, of: int, what: str) -> None:
        if what == "writing" and done > of // 2:
            raise KeyboardInterrupt(what)

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "b", Options(), stop)
    assert names(tmp_path) == ["a"]


def test_failed_check_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from monoblock.conversion import convert as module

    source = saved(mistral(), tmp_path / "a")
    write = FORMATS["hub"].write
    assert write is not None

    def damaged(folder: Path, checkpoint: Any, options: Any) -> None:
        write(folder, checkpoint, options)
        state = load_file(folder / "model.safetensors")
        state["model.norm.weight"][3] += 1e-7
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    from dataclasses import replace

    monkeypatch.setattr(module, "FORMATS", {**FORMATS, "hub": replace(FORMATS["hub"], write=damaged)})
    with pytest.raises(monoblock.CheckpointError, match="final_norm"):
        convert(source, tmp_path / "b", Options(check=True))
    assert names(tmp_path) == ["a"]


def test_existing_target(tmp_path: Path) -> None:
    source = saved(mistral(), tmp_path / "a")
    target = tmp_path / "b"
    target.mkdir()
    convert(source, target)  # an empty folder is no obstacle
    (target / "old.txt").write_text("old")
    with pytest.raises(monoblock.CheckpointError, match="--force"):
        convert(source, target)
    assert (target / "old.txt").exists()
    convert(source, target, Options(force=True))
    assert not (target / "old.txt").exists() and (target / "model.safetensors").exists()
    (target / "photographs").mkdir()
    with pytest.raises(monoblock.CheckpointError, match="photographs"):
        convert(source, target, Options(force=True))
    assert not any(name.startswith(".") for name in names(tmp_path))


def test_source_is_never_the_target(tmp_path: Path) -> None:
    source = saved(mistral(), tmp_path / "x" / "a")
    for target in (source, source.parent):
        with pytest.raises(monoblock.CheckpointError):
            convert(source, target, Options(force=True))
    assert (source / "model.safetensors").exists()


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    import socket

    source = saved(mistral(), tmp_path / "a")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    leftover = tmp_path / f"{STAGE}{socket.gethostname()}-{gone.pid}-0123456789abcdef"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    convert(source, tmp_path / "b")
    assert not any(name.startswith(".") for name in names(tmp_path))


# ------------------------------------------------------------------ wrong input


def test_wrong_sources(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(monoblock.HubError, match="has no known format"):
        convert(empty, tmp_path / "b")
    for form, words in (
        ("fuyu", "model_optim_rng"),
        ("mistral", "params.json"),
        ("openai-gpt", "params_shapes"),
    ):
        with pytest.raises(monoblock.HubError, match=words):
            convert(empty, tmp_path / "b", Options(source_format=form))
    with pytest.raises(monoblock.HubError):
        convert(tmp_path / "nowhere", tmp_path / "b", Options(source_format="mistral"))
    assert names(tmp_path) == ["empty"]


def test_wrong_options(tmp_path: Path) -> None:
    source = saved(model(), tmp_path / "a")
    for options, words in (
        (Options(dtype="int8"), "int8"),
        (Options(dtype="float64"), "float64"),
        (Options(source_format="gguf"), "gguf"),
        (Options(target_format="llm-foundry"), "llm-foundry"),
        (Options(max_shard_size="much"), "much"),
        (Options(target_format="mistral"), "MptForCausalLM cannot be written"),
    ):
        with pytest.raises(ValueError, match=words):
            convert(source, tmp_path / "b", options)


def test_damaged_openai_files(tmp_path: Path) -> None:
    config = monoblock.OpenAIGPTConfig(vocab_size=61, n_positions=16, n_embd=64, n_layer=1, n_head=1)
    folder = upstream_releases.openai_release(
        tmp_path / "a", randomised(monoblock.OpenAIGPTLMHeadModel(config))
    )
    chunk = folder / "params_4.npy"
    whole = chunk.read_bytes()
    for content, words in (
        (whole[:-40], "params_4"),
        (b"no array", "params_4"),
        (pickle.dumps({"code": print}), "params_4"),
    ):
        chunk.write_bytes(content)
        with pytest.raises(monoblock.CheckpointError, match=words):
            convert(folder, tmp_path / "b")
    np.save(chunk, np.zeros(7, np.float32))
    with pytest.raises(monoblock.CheckpointError, match="values, but"):
        convert(folder, tmp_path / "b")
    chunk.unlink()
    with pytest.raises(monoblock.CheckpointError, match="does not exist"):
        convert(folder, tmp_path / "b")
    (folder / "params_shapes.json").write_text("[[1, 2], 3]")
    with pytest.raises(monoblock.CheckpointError, match="shapes"):
        convert(folder, tmp_path / "b")


def test_missing_and_mismatched_tensors(tmp_path: Path) -> None:
    state = upstream_releases.mistral_state()
    del state["layers.1.attention.wk.weight"]
    with pytest.raises(monoblock.MissingKeys, match=r"layers\.1\.attention"):
        convert(upstream_releases.mistral_release(tmp_path / "a", state), tmp_path / "b")
    state = upstream_releases.mistral_state() | {"vision_encoder.patch.weight": torch.ones(2)}
    with pytest.raises(monoblock.UnexpectedKeys, match="vision_encoder"):
        convert(upstream_releases.mistral_release(tmp_path / "a", state), tmp_path / "b")
    with pytest.raises(monoblock.ShapeMismatch, match="attention"):
        convert(upstream_releases.mistral_release(tmp_path / "a", n_kv_heads=4), tmp_path / "b")
    with pytest.raises(monoblock.UnreadKeys, match=r"layers\.1"):
        convert(upstream_releases.mistral_release(tmp_path / "a", n_layers=1), tmp_path / "b")
    assert names(tmp_path) == ["a"]


class Bomb:
    """A malicious pickle."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def test_pickled_code_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = upstream_releases.mistral_release(
        tmp_path / "a", {**upstream_releases.mistral_state(), "x": Bomb()}
    )  # type: ignore[dict-item]
    with pytest.raises(monoblock.CheckpointError, match="refused"):
        convert(folder, tmp_path / "b")
    (tmp_path / "f").mkdir()
    torch.save({"model": {"language_model": {}}, "args": Bomb()}, tmp_path / "f" / "model_optim_rng.pt")
    with pytest.raises(monoblock.CheckpointError):
        convert(tmp_path / "f", tmp_path / "b")
    assert names(tmp_path) == ["a", "f"]


class Evaluated:
    """Code where a trainer's objects are."""

    def __reduce__(self) -> Any:
        return eval, ("__import__('os').mkdir('exploded')",)


def test_objects_of_a_trainer_are_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = model().config
    state = {"model": {"model." + name: tensor for name, tensor in model().hub_state_dict().items()}}
    content = json.loads(config.to_json_string())
    state["integrations"] = {"huggingface": {"model": {"config": {"content": content}}}}
    torch.save({"state": state | {"callbacks": [Evaluated()]}}, tmp_path / "a.pt")
    assert convert(tmp_path / "a.pt", tmp_path / "b").architecture == "MptForCausalLM"
    assert names(tmp_path) == ["a.pt", "b"]


# ------------------------------------------------------------------ without PyTorch


def test_without_pytorch(tmp_path: Path) -> None:
    saved(mistral().bfloat16(), tmp_path / "a")
    upstream_releases.mistral_release(tmp_path / "p")
    code = f"""
import sys
sys.modules["torch"] = None
sys.modules["ml_dtypes"] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "torch" else found(name, *a)
from monoblock.conversion.convert import convert, Options
result = convert({str(tmp_path / "a")!r}, {str(tmp_path / "b")!r}, Options(dtype="float32", kv_heads=2, check=True))
assert result.comparison.equal == result.comparison.tensors and result.comparison.logits is None
convert({str(tmp_path / "b")!r}, {str(tmp_path / "c")!r}, Options(target_format="mistral", dtype="bfloat16"))
try:
    convert({str(tmp_path / "p")!r}, {str(tmp_path / "d")!r})
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == "" and done.returncode == 0
    assert 'pip install "monoblock[torch]"' in done.stdout
    found = load_file(tmp_path / "c" / "consolidated.safetensors")
    assert found["layers.0.attention.wk.weight"].dtype == torch.bfloat16
