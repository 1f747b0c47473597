"""Saves of TensorFlow models, interrupted at file operations: the old checkpoint or the new one is complete."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import interrupted_saves
import kill_points
import numpy as np
import pytest

import monoblock

POINTS = 8


@pytest.fixture(autouse=True)
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def model(tag: int) -> Any:
    made = monoblock.TFMptForCausalLM(interrupted_saves.config(tag))
    for variable in made.variables:
        variable.assign(np.full(variable.shape, tag))
    return made


def read(folder: Path) -> set[int]:
    loaded = monoblock.TFMptForCausalLM.from_pretrained(folder)
    return interrupted_saves.tags(loaded, loaded.hub_state_dict())


@interrupted_saves.LAYOUT
def test_model(tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "model"
    models = {tag: model(tag) for tag in (1, 2)}
    interrupted_saves.check(
        folder,
        lambda tag, keywords: models[tag].save_pretrained(folder, **keywords),
        lambda: read(folder),
        layout,
        POINTS,
    )


def test_saved_model_is_part_of_the_save(tmp_path: Path) -> None:
    """The folder is unchanged until all of it is written."""
    folder = tmp_path / "model"
    models = {tag: model(tag) for tag in (1, 2)}
    models[1].save_pretrained(folder)
    count = len(kill_points.operations(lambda: models[2].save_pretrained(folder, saved_model=True)))
    assert (folder / "saved_model" / "1" / "saved_model.pb").is_file()
    for at in (count // 2, count):
        shutil.rmtree(folder)
        models[1].save_pretrained(folder)
        kill_points.interrupted(lambda: models[2].save_pretrained(folder, saved_model=True), at)
        assert (folder / "saved_model").exists() == (read(folder) == {2})
