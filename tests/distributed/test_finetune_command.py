"""`torchrun -m monoblock finetune`: all tasks on four processes, and runs that are killed and resumed on fewer."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import training_processes
import training_runs
import transformers
from safetensors.torch import load_file
from training_runs import losses, metrics

from monoblock.backends.pytorch.parallel.layout import TensorLayout
from monoblock.backends.pytorch.training import shared_files
from monoblock.training import Trainer
from monoblock.training.checkpoints import SHARED, Checkpoints

torch.set_num_threads(1)

TOLERANCE = 1e-5  # float32
LAUNCH = [sys.executable, "-m", "torch.distributed.run"]
MODES: dict[str, dict[str, Any]] = {
    "fsdp": {"parallel": "fsdp"},
    "ddp": {"parallel": "ddp"},
    "tensor": {"parallel": "ddp", "tensor_parallel": 2},
    "both": {"parallel": "fsdp", "tensor_parallel": 2},
}
EMBEDDING = {"ddp": {}, "matryoshka": {"matryoshka": "4,8"}}
CASES = [
    (task, mode)
    for task in training_processes.TASKS
    for mode in (EMBEDDING if task == "embedding" else MODES)
]
# Beside the tasks; bfloat16 rounds sums in another order: half a unit of 8 bits of losses of about 4.
OTHERS: dict[str, tuple[str, dict[str, Any], float]] = {
    "bfloat16": ("mistral", {"dtype": "bfloat16", "tensor_parallel": 2}, 1e-2),
    "checkpointing": ("lm", {"gradient_checkpointing": True, "accumulation": 2}, TOLERANCE),
    "samples": ("mistral", {"sample_prompt": ["the quick"], "sample_tokens": 5}, TOLERANCE),
    "frozen": ("lm", {"freeze": ["transformer.w*", "*.h.0.*"], "tensor_parallel": 2}, TOLERANCE),
    "stopping": ("lm", {"early_stopping": 1, "learning_rate": 0.05, "max_steps": 12}, 1e-3),
}
ONE_PROCESS = ("parallel", "tensor_parallel")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[dict[str, Any]]]]:
    """The folder with the runs in one process and in four, and the results of each of the four."""
    at = tmp_path_factory.mktemp("tasks")
    jobs: list[dict[str, Any]] = []
    base = {"max_steps": 6, "eval_fraction": 0.2, "eval_every": 3, "keep_best": True}
    made = {task: training_processes.prepare(at, task) for task in training_processes.TASKS}
    for task, mode in CASES:
        model, data, own = made[task]
        more = EMBEDDING[mode] if task == "embedding" else MODES[mode]
        plain = at / f"{task} one" if task != "embedding" else at / f"{task} {mode} one"
        if not plain.exists():
            one = {name: value for name, value in more.items() if name not in ONE_PROCESS}
            training_runs.run(model, data, plain, **base, **own, **one)
        jobs.append(
            {"options": training_runs.options(model, data, at / f"{task} {mode}", **base, **own, **more)}
        )
    for name, (task, more, _) in OTHERS.items():
        model, data, own = made[task]
        given = {**base, **own, **more}
        one = {key: value for key, value in given.items() if key not in ONE_PROCESS}
        training_runs.run(model, data, at / f"{name} one", **one)
        jobs.append({"options": training_runs.options(model, data, at / name, **given)})
    return at, training_processes.train(at / "jobs", 4, jobs, 580)


def same(one: Path, other: Path, tolerance: float = TOLERANCE) -> None:
    first, second = metrics(one), metrics(other)
    assert len(first) == len(second) > 0
    for line, expected in zip(second, first, strict=True):
        assert line.keys() == expected.keys()
        for name in ("loss", "eval_loss", "grad_norm"):
            if name in line:  # norms of gradients are of the order of 10 and 100
                assert line[name] == pytest.approx(expected[name], abs=tolerance, rel=10 * tolerance), name


@pytest.mark.parametrize(("task", "mode"), CASES)
def test_a_task_has_the_losses_and_gradients_of_one_process(results: Any, task: str, mode: str) -> None:
    """Norms of the gradients too; with matryoshka, losses depend on so few values that rounding grows by the step."""
    at, _ = results
    plain = f"{task} {mode} one" if task == "embedding" else f"{task} one"
    same(at / plain, at / f"{task} {mode}", 1e-3 if mode == "matryoshka" else TOLERANCE)


@pytest.mark.parametrize("name", OTHERS)
def test_options_on_four_processes(results: Any, name: str) -> None:
    at, _ = results
    same(at / f"{name} one", at / name, OTHERS[name][2])
    if name == "samples":
        assert (at / name / "samples.jsonl").read_text() == (at / f"{name} one" / "samples.jsonl").read_text()
    if name == "stopping":
        steps = [line["step"] for line in metrics(at / name) if "loss" in line]
        assert 0 < len(steps) < 12
    if name == "frozen":
        before, after = (
            load_file(at / "lm-model" / "model.safetensors"),
            load_file(at / name / "model.safetensors"),
        )
        changed = {key for key in after if not torch.equal(before[key], after[key])}
        assert changed == {key for key in after if not (key.startswith("transformer.w") or ".h.0." in key)}


def test_all_processes_have_the_same_results(results: Any) -> None:
    _, ranks = results
    assert all(one == ranks[0] for one in ranks)
    assert not [one for one in ranks[0] if "error" in one]


# ---------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    at = tmp_path_factory.mktemp("command")
    model = training_runs.folder(at / "model", "MistralForCausalLM")
    data = training_runs.jsonl(at / "data.jsonl", training_processes.rows("lm", 90))
    return at, model, data


def command(model: Path, data: Path, output: Path, **options: Any) -> list[str]:
    found = ["-m", "monoblock", "finetune"]
    given = {"model": model, "data": data, "output": output, "device": "cpu", **options}
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        found += [flag] if value is True else [flag, str(value)]
    return found


def launched(processes: int, arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [*LAUNCH, "--nproc-per-node", str(processes), "--standalone", *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def workers(launcher: int) -> list[int]:
    """The processes that a launcher started."""
    path = Path(f"/proc/{launcher}/task/{launcher}/children")
    return [int(one) for one in path.read_text().split()]


def until(output: Path, step: int) -> None:
    """Wait for a step's line in the metrics."""
    end = time.monotonic() + 200
    while time.monotonic() < end:
        if (output / "metrics.jsonl").exists() and any(line["step"] >= step for line in lines(output)):
            return
        time.sleep(0.01)
    raise AssertionError("the run does not get on")


def lines(output: Path) -> Iterator[dict[str, Any]]:
    try:
        yield from metrics(output)
    except ValueError:  # a part of a line
        return


STEPS: dict[str, Any] = {"max_steps": 20, "batch_size": 8, "learning_rate": 1e-3, "save_every": 4}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_process_is_killed_on_four_and_two_resume(prepared: Any, seed: int, tmp_path: Path) -> None:
    """At a random step of 20: the loss curve is that of one process that is not broken, and the exported folder opens
    in transformers with the weights of the last checkpoint, bit for bit."""
    at, model, data = prepared
    if not (at / "whole").exists():
        training_runs.run(model, data, at / "whole", **STEPS)
    rng = random.Random(seed)
    first = launched(4, command(model, data, tmp_path / "out", **STEPS))
    until(tmp_path / "out", rng.randrange(5, 18))
    found = workers(first.pid)
    assert len(found) == 4
    os.kill(rng.choice(found), signal.SIGKILL)
    begin = time.monotonic()
    text = first.communicate(timeout=100)[0]
    assert first.returncode != 0 and time.monotonic() - begin < 60, text
    assert text.count("monoblock: ") <= 1 and not (tmp_path / "out" / "model.safetensors").exists()
    (step,) = Checkpoints(tmp_path / "out", 1).steps()
    assert step % 4 == 0
    second = launched(2, command(model, data, tmp_path / "out", **STEPS, resume=True))
    text = second.communicate(timeout=200)[0]
    assert second.returncode == 0, text
    assert len(losses(tmp_path / "out")) == 20
    assert losses(tmp_path / "out") == pytest.approx(losses(at / "whole"), abs=1e-4)
    checkpoint = tmp_path / "out" / "checkpoints" / "step-20"
    stored = gathered(checkpoint)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, parameter in opened.named_parameters():
        assert torch.equal(parameter, stored[f"weights:{name}"]), name
    assert not [path for path in tmp_path.rglob(".monoblock*") if path.is_dir()]


def gathered(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint of several processes, whole."""
    held = {
        name: shared_files.Held(TensorLayout.whole(shape), torch.empty(shape, dtype=dtype))
        for name, (shape, dtype) in shared_files.stored(checkpoint).items()
    }
    shared_files.read(checkpoint, held, None)
    return {name: one.tensor for name, one in held.items()}


def test_states_are_bit_equal_on_other_numbers_of_processes(prepared: Any, tmp_path: Path) -> None:
    """Written by four, read and written by two with a tensor axis, by two with FSDP2, and read by one."""
    _, model, data = prepared
    base: dict[str, Any] = {"max_steps": 4, "dtype": "bfloat16", "batch_size": 8}
    layouts = [(4, {}), (2, {"tensor_parallel": 2}), (2, {"parallel": "ddp"}), (4, {"tensor_parallel": 2})]
    found: list[dict[str, torch.Tensor]] = []
    for number, (count, more) in enumerate(layouts):
        output = tmp_path / "out"
        job = {
            "options": training_runs.options(model, data, output, **base, **more),
            "resume": bool(number),
            "copy": str(tmp_path / f"copy-{number}"),
        }
        training_processes.train(tmp_path / f"jobs-{number}", count, [job])
        found.append(gathered(tmp_path / f"copy-{number}"))
    assert any(name.endswith("/master") for name in found[0])
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())
    result = Trainer(training_runs.options(model, data, tmp_path / "out", **base)).train(resume=True)
    assert result.step == 4  # nothing is left to do
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(value, found[0][f"weights:{name}"])


def test_the_same_number_of_processes_resumes_bit_for_bit(tmp_path: Path) -> None:
    """With dropout, whose random numbers are functions of the seed and the step."""
    model = training_runs.folder(tmp_path / "model", "GPTNeoForCausalLM", embed_dropout=0.1)
    data = training_runs.jsonl(tmp_path / "data.jsonl", training_processes.rows("lm", 60))
    base: dict[str, Any] = {"max_steps": 12, "eval_fraction": 0.2, "eval_every": 4, "keep_best": True}
    whole = training_runs.options(model, data, tmp_path / "whole", **base)
    broken = training_runs.options(model, data, tmp_path / "broken", **base)
    jobs = [
        {"options": whole},
        {"options": broken, "signal": [1, 3]},
        {"options": broken, "resume": True, "signal": [0, 8]},
        {"options": broken, "resume": True},
    ]
    results = training_processes.train(tmp_path / "jobs", 2, jobs)
    assert [one["step"] for one in results[0]] == [12, 3, 8, 12]
    assert [one["interrupted"] for one in results[1]] == [None, signal.SIGTERM, signal.SIGTERM, None]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")


def test_a_process_that_fails_ends_all(prepared: Any, tmp_path: Path) -> None:
    """Within seconds, with the message of the one that failed."""
    _, model, data = prepared
    job = {"options": training_runs.options(model, data, tmp_path / "out", max_steps=9), "fail": [1, 3]}
    begin = time.monotonic()
    with pytest.raises(AssertionError, match="out of luck"):
        training_processes.train(tmp_path / "jobs", 2, [job], 100)
    assert time.monotonic() - begin < 90


def test_errors_are_told_once(prepared: Any, tmp_path: Path) -> None:
    _, model, data = prepared
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"text": 3}\n')
    for given, message in (
        ({"data": wrong}, "wrong.jsonl, line 1: 'text' must be a text, got 3"),
        ({"batch_size": 1}, "batch_size=1 is divided over 2 processes"),
        ({"task": "nothing"}, "task must be one of"),
        ({"model": tmp_path / "none"}, "none"),
    ):
        arguments = {"model": model, "data": data, **given}
        found = launched(2, command(output=tmp_path / "out", **arguments))
        text = found.communicate(timeout=200)[0]
        assert found.returncode == 1
        told = [line for line in text.splitlines() if line.startswith(("monoblock: ", "Error: "))]
        assert len(told) == 1 and message in told[0], text


def test_a_signal_to_the_launcher_saves(prepared: Any, tmp_path: Path) -> None:
    _, model, data = prepared
    found = launched(
        2, command(model, data, tmp_path / "out", **(STEPS | {"max_steps": 4000, "save_every": 4000}))
    )
    until(tmp_path / "out", 3)
    found.send_signal(signal.SIGINT)
    text = found.communicate(timeout=100)[0]
    (step,) = Checkpoints(tmp_path / "out", 1).steps()
    assert step >= 3 and f"interrupted: a checkpoint of step {step} is in " in text
    assert (tmp_path / "out" / "checkpoints" / f"step-{step}" / SHARED / ".metadata").exists()


def test_accelerate_launch(prepared: Any, tmp_path: Path) -> None:
    at, model, data = prepared
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    arguments = command(model, data, tmp_path / "out", **(STEPS | {"max_steps": 3}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*launcher, "--main_process_port", "0", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "loading in 2 processes" in done.stderr and len(losses(tmp_path / "out")) == 3
    training_runs.run(model, data, at / "three", **(STEPS | {"max_steps": 3}))
    assert losses(tmp_path / "out") == pytest.approx(losses(at / "three"), abs=TOLERANCE)
