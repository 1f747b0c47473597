"""Tiny models, data files and runs for the tests of fine-tuning."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
import transformers
from tiny_families import CLASSES, fields

from monoblock.training import Trainer, TrainingOptions, TrainingResult
from monoblock.training.trainer import Progress

COLOURS = ("red", "blue", "green", "white")


class Signal:
    """Sends a signal to this process after a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def __call__(self, progress: Progress) -> None:
        if progress.step == self.step:
            os.kill(os.getpid(), self.number)


def folder(at: Path, name: str, **more: Any) -> Path:
    """A checkpoint of that class with a tokenizer, with the small initial weights of transformers, which train well."""
    tiny_pipelines.folder(at, name, **more)
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    cls(cls.config_class(**fields(CLASSES[name], **more))).save_pretrained(at)
    return at


def jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of the words that the tiny tokenizers know."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(tiny_pipelines.PIECES[:9], k=rng.randint(2, 6))) for _ in range(count)]


def options(model: Path, data: Path, output: Path, **more: Any) -> TrainingOptions:
    """Options of a short run on the CPU."""
    base = {
        "model": model,
        "data": data,
        "output": output,
        "device": "cpu",
        "learning_rate": 1e-3,
        "batch_size": 4,
    }
    return TrainingOptions(**{**base, **more})


def run(model: Path, data: Path, output: Path, **more: Any) -> TrainingResult:
    return Trainer(options(model, data, output, **more)).train()


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in metrics(output) if "loss" in line]


def same_metrics(one: Path, other: Path, tolerance: float) -> None:
    """The metrics of two runs are the same."""
    first, second = metrics(one), metrics(other)
    assert len(first) == len(second) > 0
    for line, expected in zip(second, first, strict=True):
        assert line.keys() == expected.keys()
        for name in line.keys() - {"seconds"}:
            # Similarities are scaled, and their gradients' norm is about 10.
            assert line[name] == pytest.approx(expected[name], abs=tolerance, rel=2 * tolerance), name


def run_killed(options: TrainingOptions, at: Path, kills: int) -> int:
    """Runs the options in processes that are killed at random times, `kills` at most, until one ends the run; returns
    how many were killed. `at`: a folder for the options."""
    (at / "options.json").write_text(json.dumps(options.to_dict()))
    command = [
        sys.executable,
        str(Path(__file__).parent / "training_kills.py"),
        str(at / "options.json"),
        str(kills),
        "3",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)
