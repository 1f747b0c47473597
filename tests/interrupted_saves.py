"""Interrupted saves of models, tokenizers and configs in any framework leave either the old files or the new ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kill_points
import numpy as np
import pytest
from text_tokenizers import word_piece

import monoblock

CONFIG = {"d_model": 8, "n_heads": 2, "n_layers": 2, "vocab_size": 16, "max_seq_len": 8, "expansion_ratio": 1}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one file": ({}, {}),
    "to shards": ({}, {"max_shard_size": 2000}),
    "from shards": ({"max_shard_size": 2000}, {}),
    "as many shards": ({"max_shard_size": 2000}, {"max_shard_size": 2000}),
}


def config(tag: int) -> Any:
    """A config whose tag is in config.json and generation_config.json."""
    return monoblock.MptConfig(**CONFIG, eos_token_id=tag)


def tags(model: Any, tensors: dict[str, Any]) -> set[int]:
    """The tags of the saves that a loaded model's config and tensors come from."""
    found = {model.config.eos_token_id, model.generation_config.eos_token_id}
    for tensor in tensors.values():
        found |= {*np.unique(np.asarray(tensor() if callable(tensor) else tensor)).tolist()}
    return {int(tag) for tag in found}


def save_companions(folder: Path, tag: int) -> None:
    """Saves a tokenizer, a generation config and an image processor, one after the other."""
    backend = word_piece("a", "b")
    tokenizer = monoblock.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=tag)
    tokenizer.chat_template = {"default": str(tag), "tools": str(tag)}
    tokenizer.save_pretrained(folder)
    monoblock.GenerationConfig(max_length=tag).save_pretrained(folder, "other_config.json")
    monoblock.FuyuImageProcessor(size={"height": 30 * tag, "width": 30}).save_pretrained(folder)


def companion_tags(folder: Path) -> list[int]:
    """The tags of the files of `save_companions`, in the order of saving."""
    tokenizer = monoblock.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == {
        "default": str(tokenizer.model_max_length),
        "tools": str(tokenizer.model_max_length),
    }
    other = monoblock.GenerationConfig.from_pretrained(folder, "other_config.json").max_length
    image = monoblock.FuyuImageProcessor.from_pretrained(folder).size["height"] // 30
    return [tokenizer.model_max_length, other, image]


def check_companions(folder: Path, points: int) -> None:
    """Each save is atomic, and none begins before the previous one is complete."""

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        save_companions(folder, 1)

    prepare()
    count = len(kill_points.operations(lambda: save_companions(folder, 2)))
    for at in kill_points.spread(count, points):
        prepare()
        assert kill_points.interrupted(lambda: save_companions(folder, 2), at) == (at < count)
        found = companion_tags(folder)
        assert found == sorted(found, reverse=True)
        assert set(found) <= {1, 2}


def check(
    folder: Path,
    save: Callable[[int, dict[str, Any]], object],
    read: Callable[[], set[int]],
    layout: str,
    points: int,
) -> None:
    """Interrupts `save(tag, keywords)` at several operations; `read` returns the tags in the folder afterwards."""
    before, after = LAYOUTS[layout]

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        save(1, before)
        (folder / "README.md").write_text("mine")

    prepare()
    count = len(kill_points.operations(lambda: save(2, after)))
    outcomes: set[int] = set()
    for at in kill_points.spread(count, points):
        prepare()
        assert kill_points.interrupted(lambda: save(2, after), at) == (at < count)
        found = read()
        assert found in ({1}, {2}), f"mixed after {at} of {count} operations: {found}"
        assert (folder / "README.md").read_text() == "mine"
        outcomes |= found
    assert outcomes == {1, 2}


LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
