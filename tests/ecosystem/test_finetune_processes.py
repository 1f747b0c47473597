"""Adapters that two processes train: the losses and the files of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import training_processes
import training_runs
import transformers
from safetensors.torch import load_file
from training_runs import losses, metrics

from monoblock.training import Trainer

torch.set_num_threads(1)

TOLERANCE = 1e-5  # float32, measured 1e-6
BASE: dict[str, Any] = {
    "max_steps": 6,
    "eval_fraction": 0.2,
    "eval_every": 3,
    "learning_rate": 1e-2,
    "lora_rank": 4,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp": ("mistral", {}),
    "ddp": ("mistral", {"parallel": "ddp"}),
    "dora": ("lm", {"dora": True}),
    "head": ("classification", {}),
    "preference": ("preference", {}),
    "merge": ("mistral", {"parallel": "ddp", "merge": True}),
    "qlora": ("mistral", {"quantize": "int8"}),
    "best": ("mistral", {"keep_best": True}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("adapters")
    jobs: list[dict[str, Any]] = []
    made = {task: training_processes.prepare(at, task) for task in {task for task, _ in CASES.values()}}
    for name, (task, more) in CASES.items():
        model, data, own = made[task]
        given = {**BASE, **own, **more}
        jobs.append({"options": training_runs.options(model, data, at / name, **given)})
        training_runs.run(
            model, data, at / f"{name} one", **{k: v for k, v in given.items() if k != "parallel"}
        )
    model, data, own = made["mistral"]
    broken = training_runs.options(model, data, at / "broken", **{**BASE, **own})
    jobs += [{"options": broken, "signal": [1, 4]}]
    results = training_processes.train(at / "jobs", 2, jobs)
    assert results[0] == results[1] and not [one for one in results[0] if "error" in one], results[0]
    return at


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_two_processes_is_that_of_one(folder: Path, name: str) -> None:
    first, second = metrics(folder / f"{name} one"), metrics(folder / name)
    assert len(first) == len(second) > 0
    for line, expected in zip(second, first, strict=True):
        for key in line.keys() & {"loss", "eval_loss", "grad_norm"}:
            assert line[key] == pytest.approx(expected[key], abs=TOLERANCE), key
    file = "model.safetensors" if name == "merge" else "adapter_model.safetensors"
    found, expected = (load_file(folder / x / file) for x in (name, f"{name} one"))
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], atol=1e-4, rtol=0)
    if name != "merge":
        configs = [
            json.loads((folder / x / "adapter_config.json").read_text()) for x in (name, f"{name} one")
        ]
        for config in configs:
            config["target_modules"] = sorted(config["target_modules"])  # a set
        assert configs[0] == configs[1]
        assert not (folder / name / "model.safetensors").exists()


def test_peft_opens_the_adapter(folder: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "mistral-model")
    opened = peft.PeftModel.from_pretrained(theirs, folder / "fsdp").eval()
    state = peft.get_peft_model_state_dict(opened)
    stored = load_file(folder / "fsdp" / "adapter_model.safetensors")
    assert state.keys() == stored.keys() and all(torch.equal(state[name], stored[name]) for name in stored)


def test_one_process_resumes_the_adapter_of_two(folder: Path) -> None:
    model, data, own = (
        folder / "mistral-model",
        folder / "mistral.jsonl",
        training_processes.TASKS["mistral"][2],
    )
    options = training_runs.options(model, data, folder / "broken", **{**BASE, **own})
    assert Trainer(options).train(resume=True).step == 6
    assert losses(folder / "broken") == pytest.approx(losses(folder / "fsdp one"), abs=TOLERANCE)
