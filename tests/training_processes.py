"""Fine-tuning in processes connected by gloo, for tests/torch/test_training_processes.py and tests/distributed.

    python training_processes.py FOLDER SECONDS        (in the environment of torchrun)

FOLDER/jobs.json is a list of runs: their options, whether they resume, and perhaps the process that receives SIGTERM
("signal"), or fails ("fail"), and after which step; or a folder into which the states are written again after the
last step ("copy"). The process writes FOLDER/RANK.json with the result or the error of each, and exits after at most
SECONDS.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from monoblock.training import Trainer, TrainingOptions
from monoblock.training.trainer import TrainingRun

STEADY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# Class, fields of the config, options. Without dropout, whose random numbers depend on the number of processes.
TASKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lm": ("GPTNeoForCausalLM", {"embed_dropout": 0.0}, {"packing": True, "max_length": 24}),
    "mistral": ("MistralForCausalLM", {}, {"task": "lm", "accumulation": 2}),
    "chat": ("GPTNeoForCausalLM", {"embed_dropout": 0.0}, {"max_length": 48}),
    "classification": ("MPNetForSequenceClassification", {**STEADY, "num_labels": 2}, {}),
    "token-classification": ("MPNetForTokenClassification", {**STEADY, "num_labels": 2}, {}),
    "qa": ("MPNetForQuestionAnswering", {**STEADY, "num_labels": 2}, {"max_length": 20, "doc_stride": 3}),
    "fill-mask": ("MPNetForMaskedLM", STEADY, {}),
    "embedding": ("MPNetModel", STEADY, {}),
    "preference": ("GPTNeoForCausalLM", {"embed_dropout": 0.0}, {}),
}


def rows(task: str, count: int) -> list[dict[str, Any]]:
    """Records of a task."""
    from training_runs import sentences

    texts = sentences(count)
    if task == "chat":
        return [
            {"messages": [{"role": "user", "content": x}, {"role": "assistant", "content": y}]}
            for x, y in zip(texts, reversed(texts), strict=True)
        ]
    if task == "classification":
        return [{"text": x, "label": "fox" if "fox" in x else "none"} for x in texts]
    if task == "token-classification":
        words = [x.replace("##", "").split() for x in texts]
        return [{"tokens": w, "tags": ["B-FOX" if one == "fox" else "O" for one in w]} for w in words]
    if task == "qa":
        found = []
        for x in texts:
            word = x.split()[-1]
            answers = {"text": [word], "answer_start": [len(x) - len(word)]}
            found.append({"question": "who?", "context": x, "answers": answers})
        return found
    if task == "embedding":
        negatives = [[f"lazy {x}"] * (i % 3) for i, x in enumerate(texts)]
        return [
            {"anchor": x, "positive": f"the {x}", "negative": n or None}
            for x, n in zip(texts, negatives, strict=True)
        ]
    if task == "preference":
        return [{"prompt": "the", "chosen": f" {x}", "rejected": " lazy dog."} for x in texts]
    return [{"text": x} for x in texts]


def prepare(at: Path, name: str, count: int = 40) -> tuple[Path, Path, dict[str, Any]]:
    """A model and a data file for a task, and the options."""
    import training_runs  # imports transformers, which the processes do not need

    cls, more, options = TASKS[name]
    task = options.get("task", name)
    model = training_runs.folder(at / f"{name}-model", cls, **more)
    data = training_runs.jsonl(at / f"{name}.jsonl", rows(task, count))
    return model, data, {"task": task, **options}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank, found = int(os.environ["RANK"]), []
    for job in json.loads((folder / "jobs.json").read_text()):
        _disturb(rank, job.get("signal"), job.get("fail"), job.get("copy"))
        try:
            result = Trainer(TrainingOptions(**job["options"])).train(resume=job.get("resume", False))
            found.append({"step": result.step, "loss": result.loss, "interrupted": result.interrupted})
        except Exception as error:
            traceback.print_exc()
            found.append({"error": f"{type(error).__name__}: {error}"})
    (folder / f"{rank}.json").write_text(json.dumps(found))


_step, _steps = TrainingRun._step, TrainingRun.steps


def _disturb(rank: int, signalled: Any, fails: Any, copy: str | None) -> None:
    """Send SIGTERM to the process of a rank after a step, or let it fail, or write the states again at the end."""

    def step(self: TrainingRun) -> int:
        tokens = _step(self)
        if [rank, self.state.step] == signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        if [rank, self.state.step] == fails:
            print("out of luck", flush=True)
            os._exit(1)
        return tokens

    def steps(self: TrainingRun, show: Any) -> int | None:
        found = _steps(self, show)
        if copy is not None:
            self.checkpoints.finish()
            self.learner.start_saving(Path(copy)).result()
        return found

    TrainingRun._step, TrainingRun.steps = step, steps


# ---------------------------------------------------------------------------- in the test


def train(
    folder: Path, world: int, jobs: Sequence[dict[str, Any]], seconds: float = 300
) -> list[list[dict[str, Any]]]:
    """The results of jobs by rank, in that many processes."""
    import torch_multiprocess

    folder.mkdir(parents=True, exist_ok=True)
    plain = [{**job, "options": job["options"].to_dict()} for job in jobs]
    (folder / "jobs.json").write_text(json.dumps(plain))
    torch_multiprocess.run([__file__, str(folder), str(seconds)], world, seconds, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


if __name__ == "__main__":
    faulthandler.dump_traceback_later(float(sys.argv[2]), exit=True)
    main(Path(sys.argv[1]))
