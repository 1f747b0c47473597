"""Checkpoints of a run: folders `checkpoints/step-N`, each written whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from monoblock.checkpoint.files import read_json
from monoblock.checkpoint.transaction import staged
from monoblock.errors import CheckpointError
from monoblock.field_types import brief

FOLDER, BEST, PROGRESS = "checkpoints", "best", "progress.json"

_NAME = re.compile(r"step-(\d+)")


class Checkpoints:
    """The checkpoints of an output folder."""

    def __init__(self, output: Path, keep: int) -> None:
        self.folder, self.keep = output / FOLDER, keep

    @property
    def best(self) -> Path:
        """The folder of the best evaluation's weights."""
        return self.folder / BEST

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"step-{step}"

    def write(self, step: int, progress: dict[str, Any], save: Callable[[Path], None]) -> None:
        """Write a checkpoint by `save(folder)`, then remove the oldest ones."""
        with staged(self.path(step), whole=True) as stage:
            save(stage.files)
            stage.write(PROGRESS, json.dumps(progress, indent=1) + "\n")
        for old in self.steps()[: -self.keep]:
            # Renamed first, so that a folder of this name is whole.
            gone = self.folder / f"removed-{old}"
            shutil.rmtree(gone, ignore_errors=True)
            self.path(old).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def write_best(self, save: Callable[[Path], None]) -> None:
        """Replace the best evaluation's weights."""
        with staged(self.best, whole=True) as stage:
            save(stage.files)

    def progress(self, step: int) -> dict[str, Any]:
        """What `write` stored beside the weights."""
        path = self.path(step) / PROGRESS
        found = read_json(path)
        if found.get("step") != step:
            raise CheckpointError(f"{path} is of step {brief(found.get('step'))}, expected {step}")
        return found


def check_same(stored: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """ValueError if a run would continue with another option or other data than it began with."""
    for name, value in now.items():
        if stored.get(name) != value:
            raise ValueError(
                f"{where} was written with {name}={brief(stored.get(name))}, not {brief(value)}: resume with the same "
                "options and data, or choose another output"
            )
