"""`monoblock finetune --framework flax`: losses, the same first steps as PyTorch's, resumption, refused options."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import training_runs
from training_runs import jsonl, metrics, sentences

from monoblock.checkpoint.hub import find_weights
from monoblock.checkpoint.store import open_store
from monoblock.training import Trainer, TrainingOptions, trainer

# Float32 sums in another order; AdamW divides by the root of small squares, so that later steps differ more.
FIRST, LATER = 2e-5, 2e-3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("models")
    return {
        "lm": training_runs.folder(top / "lm", "GPTNeoForCausalLM"),
        "classification": training_runs.folder(
            top / "classes", "MPNetForSequenceClassification", num_labels=2
        ),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("data")
    texts = sentences(20)
    return {
        "lm": jsonl(top / "lm.jsonl", [{"text": text} for text in texts]),
        "classification": jsonl(
            top / "classes.jsonl", [{"text": text, "label": int("a" in text)} for text in texts]
        ),
    }


def run(
    task: str, models: Any, data: Any, output: Path, resume: bool = False, **more: Any
) -> list[dict[str, Any]]:
    options = {
        "task": task,
        "framework": "flax",
        "max_steps": 8,
        "eval_fraction": 0.2,
        "max_length": 16,
        **more,
    }
    made = training_runs.options(models[task], data[task], output, **options)
    Trainer(made).train(resume=resume)
    return metrics(output)


def losses(lines: list[dict[str, Any]]) -> np.ndarray:
    return np.array([line["loss"] for line in lines if "loss" in line])


def without_dropout(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {name: 0.0 for name in config if "dropout" in name or name.endswith("pdrop")}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("task", ["lm", "classification"])
def test_the_losses_are_those_of_pytorch_and_fall(
    task: str, models: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    plain = {task: without_dropout(models[task], tmp_path / "model")}
    more = {"accumulation": 2, "learning_rate": 3e-3, "weight_decay": 0.1}
    own = run(task, plain, data, tmp_path / "flax", **more)
    other = run(task, plain, data, tmp_path / "pt", framework="pt", **more)
    difference = abs(losses(own) - losses(other))
    assert difference[0] < FIRST and difference.max() < LATER, difference
    assert losses(own)[-1] < losses(own)[0]
    first, second = (next(line for line in lines if "eval_loss" in line) for lines in (own, other))
    for name, value in first.items():
        assert value == pytest.approx(second[name], abs=1e-4), name
    assert abs(own[0]["eval_loss"] - other[0]["eval_loss"]) < FIRST


def test_a_resumed_run_has_the_same_weights(
    models: dict[str, Path], data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, whose keys are those of the step."""
    options = {
        "device": "auto",
        "save_every": 3,
        "max_steps": 6,
        "sample_prompt": ("the",),
        "sample_tokens": 3,
    }
    run("lm", models, data, tmp_path / "whole", **options)

    def stop(self: Any) -> int:
        if self.state.step == 4:
            raise KeyboardInterrupt
        return step(self)

    step = trainer.TrainingRun._step
    monkeypatch.setattr(trainer.TrainingRun, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run("lm", models, data, tmp_path / "parts", **options)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "parts" / "checkpoints").iterdir()] == ["step-3"]
    run("lm", models, data, tmp_path / "parts", resume=True, **options)
    one, two = (open_store(find_weights(tmp_path / name), "np") for name in ("whole", "parts"))
    for name in one:
        assert np.array_equal(one.tensor(name), two.tensor(name)), name
    assert (tmp_path / "whole" / "samples.jsonl").read_text() == (
        tmp_path / "parts" / "samples.jsonl"
    ).read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"task": "chat"}, "trains the tasks lm and classification, not chat"),
        ({"packing": True}, "packing needs framework=pt"),
        ({"dtype": "bfloat16"}, "dtype needs framework=pt"),
        ({"freeze": ("a",)}, "freeze needs framework=pt"),
        ({"lora_rank": 4}, "lora_rank needs framework=pt"),
        ({"framework": "tf"}, "framework must be one of pt, flax"),
    ],
)
def test_what_it_does_not_have_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**{"framework": "flax", **more})
