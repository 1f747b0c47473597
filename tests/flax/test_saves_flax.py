"""Saves of Flax models, interrupted at file operations: the old checkpoint or the new one is complete."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import interrupted_saves
import jax
import jax.numpy as jnp
import pytest

import monoblock

POINTS = 8


@pytest.fixture(autouse=True)
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def model(tag: int) -> Any:
    made = monoblock.FlaxMptForCausalLM(interrupted_saves.config(tag))
    made.params = jax.tree.map(lambda x: jnp.full_like(x, tag), made.params)
    return made


@pytest.mark.parametrize("safetensors", [True, False])
@interrupted_saves.LAYOUT
def test_model(tmp_path: Path, layout: str, safetensors: bool) -> None:
    folder = tmp_path / "model"
    models = {tag: model(tag) for tag in (1, 2)}

    def read() -> set[int]:
        loaded = monoblock.FlaxMptForCausalLM.from_pretrained(folder)
        return interrupted_saves.tags(loaded, loaded.hub_tensors())

    interrupted_saves.check(
        folder,
        lambda tag, keywords: models[tag].save_pretrained(folder, safe_serialization=safetensors, **keywords),
        read,
        layout,
        POINTS,
    )
