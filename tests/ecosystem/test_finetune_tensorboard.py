"""The metrics of a run in TensorBoard's own reader."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
import training_runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import Signal, jsonl, metrics, sentences

from monoblock.training import Trainer

torch.set_num_threads(1)


def scalars(output: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(output / "runs")).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_scalars_are_the_lines_of_the_metrics(tmp_path: Path) -> None:
    """Also after a resume, and after a run that was killed later than its last checkpoint."""
    model = training_runs.folder(tmp_path / "model", "GPTNeoForCausalLM")
    data = jsonl(tmp_path / "data.jsonl", ({"text": text} for text in sentences(40)))
    base = {
        "max_steps": 8,
        "eval_fraction": 0.2,
        "eval_every": 2,
        "save_every": 3,
        "report_to": "tensorboard",
    }
    options = training_runs.options(model, data, tmp_path / "out", **base)

    class Killed(BaseException):
        pass

    def kill(progress: object) -> None:
        if getattr(progress, "step", 0) == 5:
            raise Killed

    Trainer(options).train(show=Signal(2, signal.SIGTERM))
    with pytest.raises(Killed):
        Trainer(options).train(resume=True, show=kill)
    Trainer(options).train(resume=True)
    lines, found = metrics(tmp_path / "out"), scalars(tmp_path / "out")
    names = {"loss", "learning_rate", "grad_norm", "epoch"}
    expected = {f"train/{n}": [(x["step"], x[n]) for x in lines if n in x] for n in names}
    for name in ("loss", "perplexity"):
        values = [(x["step"], x[f"eval_{name}"]) for x in lines if f"eval_{name}" in x]
        expected[f"eval/{name}"] = values
    rates = found.pop("train/tokens_per_second")
    assert [step for step, _ in rates] == list(range(1, 9)) and all(rate > 0 for _, rate in rates)
    assert found.keys() == expected.keys()
    for tag, values in expected.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in values]
        assert [x for _, x in found[tag]] == pytest.approx([x for _, x in values], rel=1e-6)
