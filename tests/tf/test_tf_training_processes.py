"""Fine-tuning on TensorFlow with two workers of MultiWorkerMirroredStrategy: the losses and the files of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import training_runs
import xla_processes
from contract.training import losses, made, with_dropout
from training_runs import metrics

from monoblock.training import Trainer

TOLERANCE = 1e-5  # float32, measured 5e-7
# 16 rows in batches of 5, whose last one has one row, so that a worker has none.
BASE: dict[str, Any] = {"task": "lm", "framework": "tf", "eval_fraction": 0.2, "max_length": 16}
BASE |= {
    "max_steps": 4,
    "batch_size": 5,
    "save_every": 2,
    "eval_every": 4,
    "keep_best": True,
    "device": "auto",
}


def test_two_workers_have_the_losses_of_one_which_continues(tmp_path: Path) -> None:
    """SIGTERM to the second worker ends both."""
    model, data = made("lm", tmp_path)
    with_dropout(model, 0.0)

    def options(name: str, **more: Any) -> Any:
        return training_runs.options(model, data, tmp_path / name, **{**BASE, **more})

    Trainer(options("one")).train()
    jobs = [{"options": options("two")}, {"options": options("broken"), "signal": [1, 2]}]
    results = xla_processes.train(tmp_path / "jobs", "tf", 2, jobs)
    assert results[0] == results[1] and [one["step"] for one in results[0]] == [4, 2]
    expected = metrics(tmp_path / "one")
    for line, other in zip(metrics(tmp_path / "two"), expected, strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - {"seconds"}:
            assert line[name] == pytest.approx(other[name], abs=TOLERANCE, rel=2 * TOLERANCE), name
    files = [
        sorted(str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*"))
        for name in ("one", "two")
    ]
    assert files[0] == files[1]
    Trainer(options("broken")).train(resume=True)
    assert losses(metrics(tmp_path / "broken")) == pytest.approx(losses(expected), abs=TOLERANCE)
