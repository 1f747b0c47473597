"""Fine-tuning on JAX in two processes: the losses of one, and checkpoints that one continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import training_runs
import xla_processes
from contract.training import assert_same_weights, losses, made, with_dropout
from training_runs import metrics

from monoblock.training import Trainer
from monoblock.training.checkpoints import SHARED, Checkpoints
from monoblock.training.processes import processes

TOLERANCE = 1e-5  # float32, measured 5e-7
BASE: dict[str, Any] = {"task": "lm", "framework": "flax", "eval_fraction": 0.2, "max_length": 16}
BASE |= {"max_steps": 4, "batch_size": 4, "save_every": 2, "eval_every": 4, "keep_best": True}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run in one process; in two, one that SIGTERM to the second process ends, and the options of a run."""
    at = tmp_path_factory.mktemp("runs")
    model, data = made("lm", at)
    with_dropout(model, 0.1)  # its random numbers do not depend on the processes

    def options(name: str, **more: Any) -> Any:
        return training_runs.options(model, data, at / name, **{**BASE, **more})

    Trainer(options("one")).train()
    jobs = [{"options": options("two"), "signal": [1, 2]}]
    return at, options, xla_processes.train(at / "jobs", "flax", 2, jobs)


def test_a_signal_ends_both_and_one_process_continues(runs: Any) -> None:
    at, options, results = runs
    assert results[0] == results[1] and results[0][0]["step"] == 2 and results[0][0]["interrupted"]
    assert (Checkpoints(at / "two", 1).path(2) / SHARED).is_dir()
    begun = losses(metrics(at / "two"))
    assert begun == pytest.approx(losses(metrics(at / "one"))[:2], abs=TOLERANCE)
    assert Trainer(options("two")).train(resume=True).step == 4
    assert losses(metrics(at / "two")) == pytest.approx(losses(metrics(at / "one")), abs=TOLERANCE)
    assert_same_weights(at / "two", at / "two" / "checkpoints" / "best")


def test_a_mesh_of_the_devices_of_one_process(runs: Any, tmp_path: Path) -> None:
    """There is one here; other sizes are refused."""
    _, options, _ = runs
    among: Any = processes(options("mesh", mesh="fsdp=1"))
    assert among.size == 1 and among.mesh.shape == {"data": 1, "fsdp": 1, "tensor": 1}
    assert among.agreed("x") == "x" and among.any(True) and among.collected(3) == [3]
    with pytest.raises(ValueError, match="mesh=data=2 must have as many devices as there are, 1"):
        processes(options("mesh", mesh="data=2"))
    with pytest.raises(ValueError, match="tensor_parallel=2 must divide the number of devices, 1"):
        processes(options("mesh", tensor_parallel=2))
    with pytest.raises(ValueError, match="device=cpu:0: a mesh has all devices of a kind"):
        processes(options("mesh", mesh="data=1", device="cpu:0"))
    assert np.isfinite(Trainer(options("mesh", mesh="fsdp=1"), among).train().loss)
