"""Checkpoints of a run: folders `checkpoints/step-N`, each written whole or not at all, by one process or several."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from monoblock.checkpoint.files import read_json
from monoblock.checkpoint.transaction import Staging, staged
from monoblock.errors import CheckpointError
from monoblock.field_types import brief
from monoblock.training.options import TrainingOptions
from monoblock.training.processes import Processes

FOLDER, BEST, PROGRESS = "checkpoints", "best", "progress.json"
SHARED = "shared"  # the subfolder with the files of several processes

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
        self.remove_old()

    def remove_old(self) -> None:
        """Remove all but the newest checkpoints."""
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

    def poll(self) -> None:
        """Complete a checkpoint whose files are written. One process writes them at once."""

    def finish(self) -> None:
        """Wait until the last checkpoint is written."""

    def progress(self, step: int) -> dict[str, Any]:
        """What `write` stored beside the weights."""
        path = self.path(step) / PROGRESS
        found = read_json(path)
        if found.get("step") != step:
            raise CheckpointError(f"{path} is of step {brief(found.get('step'))}, expected {step}")
        return found


class _Pending(NamedTuple):
    """A checkpoint that is being written: the files' stage in the first process, and the future of this process."""

    stage: Staging | None
    progress: dict[str, Any]
    written: Any


class SharedCheckpoints(Checkpoints):
    """Checkpoints of several processes, which see the same output folder. Each writes its part, in the background; the
    first moves a whole one into place when all are done. All processes call the methods in the same order."""

    def __init__(self, output: Path, keep: int, processes: Processes) -> None:
        super().__init__(output, keep)
        self.processes = processes
        self._pending: _Pending | None = None

    def start(self, step: int, progress: dict[str, Any], save: Callable[[Path], Any]) -> None:
        """Begin a checkpoint by `save(folder)`, which gives a future, after the one before is complete."""
        self.finish()
        self._pending = self._begun(self.path(step), progress, save)

    def write_best(self, save: Callable[[Path], Any]) -> None:
        self.finish()
        self._complete(self._begun(self.best, {}, save))
        self.processes.agreed(None)  # the files are in place when a process goes on

    def poll(self) -> None:
        if self._pending is not None and self.processes.first and self._pending.written.done():
            self._complete(self._pending)
            # The other processes wait for their part, which is done as well, before the next checkpoint.
            self._pending = None

    def finish(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._complete(pending)

    def _begun(self, folder: Path, progress: dict[str, Any], save: Callable[[Path], Any]) -> _Pending:
        stage = Staging(folder, whole=True) if self.processes.first else None
        files = self.processes.agreed(None if stage is None else str(stage.files))
        return _Pending(stage, progress, save(Path(files)))

    def _complete(self, pending: _Pending) -> None:
        """Wait for the files; the first process then moves the folder into place."""
        stage = pending.stage
        try:
            pending.written.result()
            if stage is not None:
                if pending.progress:
                    stage.write(PROGRESS, json.dumps(pending.progress, indent=1) + "\n")
                stage.commit()
        except BaseException as error:
            if stage is not None:
                stage.discard()
            if isinstance(error, OSError):
                raise CheckpointError(
                    f"a checkpoint could not be written: {error.strerror or error}"
                ) from error
            raise
        if stage is not None and pending.progress:
            self.remove_old()


def check_same(stored: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """ValueError if a run would continue with another option or other data than it began with. An option that an
    earlier version did not have had its default."""
    defaults = TrainingOptions().to_dict()
    for name, value in now.items():
        before = stored.get(name, defaults.get(name))
        if before != value:
            raise ValueError(
                f"{where} was written with {name}={brief(before)}, not {brief(value)}: resume with the same "
                "options and data, or choose another output"
            )
