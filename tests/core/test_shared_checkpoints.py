"""Checkpoints of several processes: the first one moves a folder into place when all parts are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from monoblock.errors import CheckpointError
from monoblock.training.checkpoints import SHARED, SharedCheckpoints
from monoblock.training.processes import Processes


class Two(Processes):
    """The first or the second of two processes; `told` is what the first one agrees on."""

    size = 2
    told: Any = None

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def agreed(self, value: Any) -> Any:
        if self.rank == 0:
            Two.told = value
        return Two.told


class Future:
    """A save in the background, which is done when the test sets `ready`."""

    def __init__(self, error: Exception | None = None) -> None:
        self.ready, self.error = False, error

    def done(self) -> bool:
        return self.ready

    def result(self) -> None:
        self.ready = True
        if self.error is not None:
            raise self.error


def begun(run: SharedCheckpoints, step: int, future: Future) -> None:
    def save(folder: Path) -> Future:
        (folder / SHARED).mkdir(exist_ok=True)
        (folder / SHARED / f"part-{run.processes.rank}").write_text(str(step))
        return future

    run.start(step, {"step": step}, save)


def test_a_checkpoint_appears_when_it_is_whole(tmp_path: Path) -> None:
    runs, futures = [SharedCheckpoints(tmp_path, 1, Two(rank)) for rank in (0, 1)], [Future(), Future()]
    for run, future in zip(runs, futures, strict=True):
        begun(run, 3, future)
        run.poll()
    assert runs[0].steps() == []
    futures[1].ready = True
    runs[1].poll()
    assert runs[0].steps() == []  # the first one knows when all parts are written
    futures[0].ready = True
    runs[0].poll()
    assert runs[1].steps() == [3] and runs[1].progress(3) == {"step": 3}
    assert sorted(path.name for path in (runs[0].path(3) / SHARED).iterdir()) == ["part-0", "part-1"]
    for run in runs:
        begun(run, 6, Future())
    for run in runs:
        run.finish()
    assert runs[0].steps() == [6]  # and the older one is removed


def test_a_failed_one_leaves_the_one_before(tmp_path: Path) -> None:
    run = SharedCheckpoints(tmp_path, 1, Two(0))
    begun(run, 3, Future())
    run.finish()
    begun(run, 6, Future(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="a checkpoint could not be written: No space left on device"):
        run.finish()
    assert run.steps() == [3]
    assert not [path for path in tmp_path.rglob(".monoblock*") if path.is_dir()]
    run.finish()  # nothing is left to wait for


def test_the_best_weights_wait_for_the_checkpoint_before(tmp_path: Path) -> None:
    """Two are not written at the same time."""
    run, first = SharedCheckpoints(tmp_path, 1, Two(0)), Future()
    begun(run, 3, first)

    def save(folder: Path) -> Future:
        assert first.ready
        (folder / SHARED).mkdir()
        return Future()

    run.write_best(save)
    assert (run.best / SHARED).is_dir() and run.steps() == [3]
