"""Fine-tuning in two processes: the losses, gradients and checkpoints of one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import training_processes
import training_runs
from safetensors.torch import load_file
from tiny_families import fields
from training_runs import losses, same_metrics

import monoblock
from monoblock.backends.pytorch.parallel.layout import TensorLayout, layout
from monoblock.partition import shard_shapes, tensor_plan
from monoblock.training import Trainer, TrainingOptions
from monoblock.training import processes as processes_module
from monoblock.training.checkpoints import SHARED
from monoblock.training.processes import launch, processes

torch.set_num_threads(1)

TOLERANCE = 1e-5  # float32, measured 1e-6
# Five rows a batch, so that the processes have different numbers of rows, and one of them none in the last batch. All
# tasks are in tests/distributed.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp": ("mistral", {"batch_size": 5, "gradient_checkpointing": True, "keep_best": True}),
    "tensor": ("lm", {"tensor_parallel": 2, "freeze": ["*.h.0.*"]}),
    "8bit": ("lm", {"optimizer": "adamw_8bit"}),
    "pairs": ("embedding", {"batch_size": 5, "chunk_size": 2}),
}
BASE: dict[str, Any] = {"max_steps": 6, "eval_fraction": 0.2, "eval_every": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs in one process, and in two; a run that a signal to the second process ends, and one that continues a
    checkpoint of one process."""
    at = tmp_path_factory.mktemp("processes")
    jobs: list[dict[str, Any]] = []
    for name, (task, more) in RUNS.items():
        model, data, own = training_processes.prepare(at, task, 33)
        given = {**BASE, **own, **more}
        jobs.append({"options": training_runs.options(model, data, at / name, **given)})
        one = {key: value for key, value in given.items() if key not in ("parallel", "tensor_parallel")}
        training_runs.run(model, data, at / f"{name} one", **one)
    model, data, own = at / "lm-model", at / "lm.jsonl", {"task": "lm", **training_processes.TASKS["lm"][2]}
    broken = training_runs.options(model, data, at / "broken", **own, max_steps=6)
    jobs.append({"options": broken, "signal": [1, 3]})
    options = training_runs.options(model, data, at / "continued", **own, max_steps=6, save_every=3, keep=2)
    Trainer(options).train()
    shutil.copytree(at / "continued", at / "unbroken")
    shutil.rmtree(at / "continued" / "checkpoints" / "step-6")
    jobs.append({"options": options, "resume": True})
    results = training_processes.train(at / "jobs", 2, jobs)
    assert results[0] == results[1]
    (at / "results.json").write_text(json.dumps(results[0]))
    return at


@pytest.mark.parametrize("name", RUNS)
def test_losses_gradients_and_metrics_are_those_of_one_process(folder: Path, name: str) -> None:
    same_metrics(folder / f"{name} one", folder / name, TOLERANCE)
    files = sorted(path.name for path in (folder / f"{name} one").iterdir() if path.is_file())
    assert sorted(path.name for path in (folder / name).iterdir() if path.is_file()) == files
    found, expected = (load_file(folder / x / "model.safetensors") for x in (name, f"{name} one"))
    assert found.keys() == expected.keys()
    for key in found if name in ("fsdp", "tensor") else ():
        # MPNet has biases whose gradients are 0 but for rounding, and Adam's steps are as long for tiny gradients.
        torch.testing.assert_close(found[key], expected[key], atol=1e-4, rtol=0)


def test_a_signal_to_one_process_ends_all_and_one_process_resumes(folder: Path) -> None:
    """After the step; the loss curve is that of an unbroken run."""
    (result,) = (one for one in json.loads((folder / "results.json").read_text()) if one["interrupted"])
    step = folder / "broken" / "checkpoints" / f"step-{result['step']}"
    assert result["step"] == 3 and (step / SHARED / ".metadata").exists()
    model, data, own = folder / "lm-model", folder / "lm.jsonl", training_processes.TASKS["lm"][2]
    options = training_runs.options(model, data, folder / "broken", task="lm", **own, max_steps=6)
    assert Trainer(options).train(resume=True).step == 6
    assert losses(folder / "broken") == pytest.approx(losses(folder / "unbroken"), abs=TOLERANCE)


def test_two_processes_resume_a_checkpoint_of_one(folder: Path) -> None:
    found = losses(folder / "continued")
    assert found == pytest.approx(losses(folder / "unbroken"), abs=TOLERANCE)
    written = folder / "continued" / "checkpoints"
    assert (written / "step-6" / SHARED).is_dir() and not (written / "step-3" / SHARED).exists()


class StandIn:
    """A parameter that FSDP2 divides over some processes."""

    def __init__(self, shape: tuple[int, ...], rank: int, size: int) -> None:
        self.shape = torch.Size(shape)
        self.device_mesh = SimpleNamespace(size=lambda: size, get_local_rank=lambda: rank)

    def to_local(self) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("name", ["GPTNeoForCausalLM", "FuyuForCausalLM", "OpenAIGPTLMHeadModel"])
def test_the_parts_of_all_processes_are_the_whole_tensors(name: str) -> None:
    """Two shards of matrices, with fused ones and transposed ones, whose rows three processes divide."""
    model_type = {"GPT": "gpt_neo", "Fuy": "fuyu", "Ope": "openai-gpt"}[name[:3]]
    sizes = {} if model_type == "openai-gpt" else {"intermediate_size": 48}
    cls = getattr(monoblock, name)
    model = cls(cls.config_class(**fields(model_type, 8, **sizes)))
    plan = tensor_plan(model.spec, model.head_spec, model.keymap())
    for key, parameter in model.named_parameters():
        shard, seen = plan[key], torch.zeros(parameter.shape, dtype=torch.int64)
        for tensor in range(2):
            shape = list(parameter.shape)
            group: Any = SimpleNamespace(rank=tensor, size=2)
            if shard.dim is not None:
                shape[shard.dim] = shard.size(tensor, 2)
            for data in range(3):
                found = layout(StandIn(tuple(shape), data, 3), shard, group)  # pyright: ignore[reportArgumentType]
                assert found.shape == tuple(parameter.shape)
                own = torch.zeros(
                    max(0, min(-(-shape[0] // 3), shape[0] - data * -(-shape[0] // 3))), *shape[1:]
                )
                for box in found.boxes:
                    box.of(seen, whole=True).add_(1)
                    box.of(own).add_(1)
                assert (own == 1).all()
        copies = 1 if shard.dim is not None else 2
        assert (seen == copies).all(), key
    assert shard_shapes(model.spec, model.head_spec, 0, 2)
    assert TensorLayout.whole(()).boxes[0].of(torch.tensor(3.0)) == 3


def test_wrong_numbers_of_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match="tensor_parallel=2 needs as many processes: start the command by torchrun"
    ):
        processes(TrainingOptions(tensor_parallel=2))
    assert launch().size == 1
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert launch().size == 3
    refused: list[tuple[dict[str, Any], str]] = [
        ({"tensor_parallel": 2}, "tensor_parallel=2 must divide the number of processes, 3"),
        ({"batch_size": 2}, "batch_size=2 is divided over 3 processes: give at least one row for each"),
        ({"framework": "tf"}, "framework=tf finds its workers in the environment variable TF_CONFIG"),
        ({"lora_rank": 2, "merge": True}, "merge needs whole weights, which parallel=fsdp divides"),
    ]
    for more, message in refused:
        with pytest.raises(ValueError, match=message):
            processes(TrainingOptions(**more))
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ValueError, match="RANK=3 and WORLD_SIZE=3 of the environment must be"):
        launch()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not processes_module.reports()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"parallel": "tp"}, "parallel must be one of fsdp, ddp, got 'tp'"),
        ({"task": "embedding", "parallel": "fsdp"}, "parallel=fsdp does not divide the weights of embedding"),
        (
            {"lora_rank": 2, "quantize": "int8", "parallel": "fsdp"},
            "parallel=fsdp does not divide the weights of quantize: use parallel=ddp",
        ),
        (
            {"task": "embedding", "tensor_parallel": 2},
            "tensor_parallel does not divide the modules of task=emb",
        ),
        (
            {"lora_rank": 2, "tensor_parallel": 2},
            "tensor_parallel does not divide the matrices of an adapter",
        ),
        ({"framework": "tf", "parallel": "fsdp"}, "parallel=fsdp needs framework=pt or flax"),
    ],
)
def test_what_cannot_be_divided_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**given)


def test_one_process_imports_nothing_of_several(tmp_path: Path) -> None:
    model, data, own = training_processes.prepare(tmp_path, "lm", 8)
    code = (
        "import sys, json; from monoblock.training import Trainer, TrainingOptions\n"
        "Trainer(TrainingOptions(**json.loads(sys.argv[1]))).train()\n"
        "print([n for n in sys.modules if n.startswith(('torch.distributed.checkpoint', 'torch.distributed.fsdp', "
        "'monoblock.backends.pytorch.training.shared', 'monoblock.backends.pytorch.training.processes'))])"
    )
    options = training_runs.options(model, data, tmp_path / "out", **own, max_steps=1).to_dict()
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(options)], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.strip() == "[]", done.stderr
