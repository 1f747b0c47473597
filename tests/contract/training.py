"""The contract of fine-tuning on JAX and TensorFlow: PyTorch's losses, exact resumption, refused options."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import training_runs
from tiny_families import ONE_LAYER
from training_runs import jsonl, metrics, sentences

from monoblock.checkpoint.hub import find_weights
from monoblock.checkpoint.store import open_store
from monoblock.training import Trainer, TrainingOptions

# Float32 sums in another order, which the steps of AdamW then enlarge.
FIRST, LATER = 2e-5, 2e-4


def made(task: str, folder: Path) -> tuple[Path, Path]:
    """A model and data: 20 texts of at most 16 tokens, 4 of them held out, so that all batches have 4 rows."""
    texts = sentences(20)
    if task == "lm":
        model = training_runs.folder(folder / "model", "GPTNeoForCausalLM", **ONE_LAYER["gpt_neo"])
        rows: list[Any] = [{"text": text[: 6 + i % 10]} for i, text in enumerate(texts)]
    else:
        fields = {**ONE_LAYER["mpnet"], "num_labels": 2}
        model = training_runs.folder(folder / "model", "MPNetForSequenceClassification", **fields)
        rows = [{"text": text, "label": int("a" in text)} for text in texts]
    return model, jsonl(folder / "data.jsonl", rows)


def with_dropout(model: Path, rate: float) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text())
    names = [name for name in config if name.endswith(("dropout", "dropout_prob", "pdrop"))]
    assert names
    path.write_text(json.dumps(config | dict.fromkeys(names, rate)))


def run(
    task: str, model: Path, data: Path, output: Path, resume: bool = False, **more: Any
) -> list[dict[str, Any]]:
    options = {"task": task, "eval_fraction": 0.2, "max_length": 16, "max_steps": 6, **more}
    Trainer(training_runs.options(model, data, output, **options)).train(resume=resume)
    return metrics(output)


def losses(lines: list[dict[str, Any]]) -> np.ndarray:
    return np.array([line["loss"] for line in lines if "loss" in line])


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = (open_store(find_weights(folder), "np") for folder in (one, other))
    assert set(first) == set(second)
    for name in first:
        assert np.array_equal(first.tensor(name), second.tensor(name)), name


class LearnerContract:
    framework: ClassVar[str]

    @pytest.mark.parametrize("task", ["lm", "classification"])
    def test_the_losses_are_those_of_pytorch_and_fall(self, task: str, tmp_path: Path) -> None:
        """Without dropout, with an epsilon that shows in every step; the weights saved are those of the best
        evaluation. The first sample is PyTorch's."""
        model, data = made(task, tmp_path)
        with_dropout(model, 0.0)
        more = {"accumulation": 2, "learning_rate": 3e-3, "weight_decay": 0.3, "epsilon": 1e-3}
        more |= {"max_grad_norm": 0.5}
        if task == "lm":
            more |= {"sample_prompt": ("the",), "sample_tokens": 3}
        output = tmp_path / self.framework
        own = run(task, model, data, output, framework=self.framework, keep_best=True, **more)
        other = run(task, model, data, tmp_path / "pt", **more)
        difference = abs(losses(own) - losses(other))
        assert difference[0] < FIRST and difference.max() < LATER, difference
        assert losses(own)[-1] < losses(own)[0]
        norms = [[line["grad_norm"] for line in lines if "loss" in line] for lines in (own, other)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-3) and max(norms[1]) > 0.5  # clipped
        evaluations = [[line for line in lines if "eval_loss" in line] for lines in (own, other)]
        assert len(evaluations[0]) == len(evaluations[1]) == 4
        for line, expected in zip(*evaluations, strict=True):
            assert line == pytest.approx(expected, rel=2e-4), line
        assert evaluations[0][0]["eval_loss"] == pytest.approx(evaluations[1][0]["eval_loss"], abs=FIRST)
        assert_same_weights(output, output / "checkpoints" / "best")
        if task == "lm":
            samples = [
                (path / "samples.jsonl").read_text().splitlines() for path in (output, tmp_path / "pt")
            ]
            assert samples[0][0] == samples[1][0] and len(samples[0]) == 4

    def test_a_resumed_run_has_the_same_weights(self, tmp_path: Path) -> None:
        """With dropout, from the checkpoint of the third step; the metrics after it are written again."""
        model, data = made("classification", tmp_path)
        with_dropout(model, 0.1)
        options = {"framework": self.framework, "device": "auto", "save_every": 3}
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        run("classification", model, data, whole, **options)
        shutil.copytree(whole, parts)
        shutil.rmtree(parts / "checkpoints" / "step-6")
        (parts / "model.safetensors").unlink()
        run("classification", model, data, parts, resume=True, **options)
        for name in ("", "checkpoints/step-6", "checkpoints/step-6/training"):
            if list((whole / name).glob("*.safetensors")):
                assert_same_weights(whole / name, parts / name)
        assert np.array_equal(losses(metrics(whole)), losses(metrics(parts)))

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"task": "chat"}, "framework={} trains the tasks lm and classification, not chat"),
            ({"packing": True}, "packing needs framework=pt"),
            ({"dtype": "bfloat16"}, "dtype needs framework=pt"),
            ({"freeze": ("a",)}, "freeze needs framework=pt"),
            ({"lora_rank": 4}, "lora_rank needs framework=pt"),
            ({"framework": "mlx"}, "framework must be one of pt, flax, tf"),
        ],
    )
    def test_what_it_does_not_have_is_refused(self, more: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message.format(self.framework)):
            TrainingOptions(**{"framework": self.framework, **more})
