"""`monoblock finetune` on JAX and TensorFlow in several processes: all layouts, checkpoints on other numbers of
processes, and processes that are killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import training_runs
import xla_processes
from contract.training import assert_same_weights, losses, made, with_dropout
from safetensors.numpy import load_file
from training_runs import metrics, same_metrics

from monoblock.training import Trainer
from monoblock.training.checkpoints import SHARED, Checkpoints

TOLERANCE = 1e-5  # float32, measured 7e-7
# 16 rows in batches of 5: JAX fills each up to a divisible number, and one of TensorFlow's workers has no row of the
# last one.
BASE: dict[str, Any] = {
    "eval_fraction": 0.2,
    "max_length": 16,
    "max_steps": 6,
    "batch_size": 5,
    "eval_every": 3,
}
BASE |= {"save_every": 3, "keep": 2, "keep_best": True, "device": "auto"}
# Processes, devices of each, options.
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "fsdp": (2, 1, {}),
    "ddp": (2, 1, {"parallel": "ddp", "accumulation": 2}),
    "tensor": (2, 1, {"tensor_parallel": 2, "gradient_checkpointing": True}),
    "mesh": (2, 2, {"mesh": "fsdp=2,tensor=2"}),
    "data": (2, 2, {"mesh": "data=2,fsdp=2"}),
    "devices": (1, 4, {"parallel": "fsdp", "tensor_parallel": 2}),
}
ONE = ("parallel", "tensor_parallel", "mesh")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Path]]:
    """The folder, the model and the data of each task, without dropout."""
    found = {}
    for task in ("lm", "classification"):
        at = tmp_path_factory.mktemp(task)
        found[task] = (at, *made(task, at))
        with_dropout(found[task][1], 0.0)
    return found


def options(models: Any, task: str, output: str, **more: Any) -> Any:
    at, model, data = models[task]
    return training_runs.options(model, data, at / output, **{"task": task, **BASE, **more})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("task", ["lm", "classification"])
def test_a_layout_on_jax_has_the_metrics_of_one_device(models: Any, task: str, layout: str) -> None:
    world, devices, more = LAYOUTS[layout]
    at = models[task][0]
    plain = {name: value for name, value in more.items() if name not in ONE}
    Trainer(options(models, task, f"{layout} one", framework="flax", **plain)).train()
    job = {"options": options(models, task, layout, framework="flax", **more)}
    results = xla_processes.train(at / f"{layout} jobs", "flax", world, [job], devices=devices)
    assert all(one == results[0] for one in results)
    same_metrics(at / f"{layout} one", at / layout, TOLERANCE)
    names = {path.name for path in (at / layout).iterdir()}
    assert names == {path.name for path in (at / f"{layout} one").iterdir()}
    found, expected = (load_file(at / name / "model.safetensors") for name in (layout, f"{layout} one"))
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in expected.items()}


@pytest.mark.parametrize(
    ("first", "second"), [((2, 1), (1, 1)), ((1, 4), (2, 1)), ((1, 1), (2, 2)), ((2, 2), (1, 4))]
)
def test_checkpoints_of_jax_continue_on_other_numbers(models: Any, first: Any, second: Any) -> None:
    """Of processes and devices of each: the losses of one device; without steps, the same weights, bit for bit."""
    at = models["lm"][0]
    if not (at / "unbroken").exists():
        Trainer(options(models, "lm", "unbroken", framework="flax")).train()
    name = f"elastic {first} {second}"

    def run(count: tuple[int, int], **job: Any) -> Any:
        layout = {"mesh": f"fsdp={count[0] * count[1]}"} if count != (1, 1) else {}
        given = options(models, "lm", name, framework="flax", **layout)
        jobs = [{"options": given, **job}]
        folder = at / f"{name} jobs {count} {len(job)}"
        return xla_processes.train(folder, "flax", count[0], jobs, devices=count[1])[0][0]

    assert run(first, signal=[0, 4])["step"] == 4
    (step,) = Checkpoints(at / name, 1).steps()[-1:]
    assert (Checkpoints(at / name, 1).path(step) / SHARED).is_dir() == (first[0] > 1)
    assert run(second, resume=True)["step"] == 6
    assert losses(metrics(at / name)) == pytest.approx(losses(metrics(at / "unbroken")), abs=TOLERANCE)
    shutil.copytree(at / name, at / f"{name} copy")
    assert run(first, resume=True, again=True)["step"] == 6  # nothing is left to do
    assert_same_weights(at / name, at / f"{name} copy")


def test_workers_of_tensorflow_classify_as_one(models: Any) -> None:
    at = models["classification"][0]
    given = {"framework": "tf", "accumulation": 2}
    Trainer(options(models, "classification", "tf one", **given)).train()
    jobs = [{"options": options(models, "classification", "tf", **given)}]
    xla_processes.train(at / "tf jobs", "tf", 3, jobs)
    same_metrics(at / "tf one", at / "tf", TOLERANCE)


def test_workers_of_tensorflow_continue_one_and_one_continues_them(models: Any) -> None:
    at = models["lm"][0]
    Trainer(options(models, "lm", "tf unbroken", framework="tf")).train()
    shutil.copytree(at / "tf unbroken", at / "tf continued")
    shutil.rmtree(at / "tf continued" / "checkpoints" / "step-6")
    jobs = [
        {"options": options(models, "lm", "tf continued", framework="tf"), "resume": True},
        {"options": options(models, "lm", "tf broken", framework="tf"), "signal": [1, 4]},
    ]
    xla_processes.train(at / "tf jobs", "tf", 2, jobs)
    Trainer(options(models, "lm", "tf broken", framework="tf")).train(resume=True)
    expected = losses(metrics(at / "tf unbroken"))
    for name in ("tf continued", "tf broken"):
        assert losses(metrics(at / name)) == pytest.approx(expected, abs=TOLERANCE), name


# ---------------------------------------------------------------------------- the command


def command(models: Any, output: str, framework: str, **more: Any) -> list[str]:
    at, model, data = models["lm"]
    found = ["-m", "monoblock", "finetune", "--framework", framework]
    given = {"model": model, "data": data, "output": at / output, "max_length": 16, "batch_size": 4, **more}
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        found += [flag] if value is True else [flag, str(value)]
    return found


@pytest.mark.parametrize("framework", ["flax", "tf"])
def test_a_process_is_killed_and_one_resumes(models: Any, framework: str) -> None:
    """The other process ends within a minute; the loss curve is that of an unbroken run."""
    at, name = models["lm"][0], f"{framework} killed"
    more = {"max_steps": 300, "save_every": 5, "learning_rate": 1e-4}
    logs = [at / f"{name} {number}.txt" for number in range(2)]
    environment = xla_processes.environments(framework, 2)
    arguments = command(models, name, framework, **more)
    running = [xla_processes.started(arguments, environment[i], logs[i]) for i in range(2)]
    try:
        until = time.monotonic() + 150
        while time.monotonic() < until and not Checkpoints(at / name, 1).steps():
            assert [one.poll() for one in running] == [None, None], [log.read_text() for log in logs]
            time.sleep(0.02)
        os.kill(running[1].pid, signal.SIGKILL)
        begin = time.monotonic()
        assert running[0].wait(120) != 0
        assert time.monotonic() - begin < 60
    finally:
        for process in running:
            process.kill()
            process.wait()
    (step,) = Checkpoints(at / name, 1).steps()
    assert step % 5 == 0 and not (at / name / "model.safetensors").exists()
    for output, steps, again in ((name, step + 3, True), (f"{name} whole", step + 3, False)):
        # The schedule is that of the whole run, which SIGTERM ends.
        alone = command(models, output, framework, **more, **({"resume": True} if again else {}))
        process = xla_processes.started(alone, xla_processes.environments(framework, 1)[0], logs[0])
        try:
            until = time.monotonic() + 150
            while time.monotonic() < until and process.poll() is None:
                if (at / output / "metrics.jsonl").exists() and len(losses_of(at / output)) >= steps:
                    break
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 128 + signal.SIGTERM, logs[0].read_text()
        finally:
            process.kill()
            process.wait()
    first, second = losses_of(at / name), losses_of(at / f"{name} whole")
    count = min(len(first), len(second))
    assert count >= step + 3 and first[:count] == pytest.approx(second[:count], abs=1e-4)


def losses_of(output: Path) -> list[float]:
    """The losses so far; the last line may be incomplete."""
    try:
        return losses(metrics(output)).tolist()
    except ValueError:
        return []


@pytest.mark.parametrize("framework", ["flax", "tf"])
def test_errors_are_told_once(models: Any, framework: str) -> None:
    """Before the processes meet, and after."""
    at = models["lm"][0]
    for more, message in (
        ({"batch_size": 1}, "batch_size=1 is divided over 2 p"),
        ({"task": "nothing"}, "task must be one of"),
        ({"model": at / "none"}, "none"),
    ):
        logs = [at / f"{framework} error {number}.txt" for number in range(2)]
        environment = xla_processes.environments(framework, 2)
        arguments = command(models, f"{framework} error", framework, **more)
        codes = xla_processes.ended(
            [xla_processes.started(arguments, environment[i], logs[i]) for i in range(2)], 100
        )
        text = "".join(log.read_text() for log in logs)
        assert set(codes) <= {1, 2, None} and set(codes) & {1, 2}, text
        told = [line for line in text.splitlines() if line.startswith(("monoblock: ", "Error: "))]
        assert len(told) == 1 and message in told[0], text


def test_torchrun_starts_processes_of_jax(models: Any) -> None:
    at = models["lm"][0]
    arguments = command(models, "torchrun", "flax", max_steps=3)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*launcher, *arguments],
        env=xla_processes.environments("flax", 1)[0],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert "loading in 2 processes" in done.stderr and len(losses(metrics(at / "torchrun"))) == 3
