"""Tensor parallelism in processes connected by gloo, for tests/torch/test_tensor_parallel.py and tests/distributed.

    python torch_multiprocess.py FOLDER SECONDS        (in the environment of torchrun)

Each folder CASE of FOLDER holds a checkpoint and case.pt: the class, the arguments of `from_pretrained`, the inputs,
and what one process computes (`expectations`). The process writes FOLDER/RANK.json with the largest differences by
case, and exits after at most SECONDS.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import monoblock
from monoblock.partition import tensor_plan

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SAMPLED = GREEDY | {"do_sample": True, "top_k": 20, "seed": 7}


def outputs(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The outputs of a forward pass by name, with the loss."""
    found = model(**inputs)
    names = ("loss", "mc_loss", "logits", "mc_logits", "start_logits", "end_logits", "last_hidden_state")
    return {name: found[name] for name in names if name in found and found[name] is not None}


def expectations(model: Any, inputs: dict[str, Any], gradients: bool = True) -> dict[str, Any]:
    """Outputs, gradients by parameter, and the tokens of greedy decoding and of sampling."""
    found: dict[str, Any] = {"outputs": outputs(model, inputs)}
    if gradients and "loss" in found["outputs"]:
        backward(found["outputs"])
        found["gradients"] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found["outputs"] = {name: value.detach() for name, value in found["outputs"].items()}
    if model.can_generate() and model.spec.causal:
        found["tokens"] = generated(model, inputs)
    return found


def backward(found: dict[str, torch.Tensor]) -> None:
    """Gradients of the sum of the losses."""
    sum(value for name, value in found.items() if name.endswith("loss")).backward()  # pyright: ignore


def generated(model: Any, inputs: dict[str, Any]) -> list[Any]:
    given = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    return [model.generate(**given, **how).tolist() for how in (GREEDY, SAMPLED)]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected magnitude (at least 1)."""
    return float((found.float() - expected.float()).abs().max() / max(1.0, float(expected.abs().max())))


def checked(folder: Path) -> dict[str, Any]:
    """The differences of one case."""
    case = torch.load(folder / "case.pt")
    cls = getattr(monoblock, case["class"])
    options = dict(case["options"])
    fsdp = options.pop("fsdp", False)
    if (axes := options.pop("axes", None)) is not None:
        options["device_mesh"] = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    model = cls.from_pretrained(folder, tp_plan="auto", **options)
    group = model.tensor_group
    if fsdp:
        mesh = group.mesh["data"]
        for block in model.get_submodule(model.module_path("layers")):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    found: dict[str, Any] = {"path": model.decoding_path(), "bytes": model.get_memory_footprint()}
    expected = case["expected"]
    outs = outputs(model, case["inputs"])
    for name, value in expected["outputs"].items():
        found[name] = difference(outs[name].detach(), value)
    if "gradients" in expected:
        backward(outs)
        plan = tensor_plan(model.config.to_spec(), model.head_spec, model.keymap())
        own = dict(model.named_parameters())
        worst = 0.0
        for name, whole in expected["gradients"].items():
            shard = plan[name]
            if shard.dim is not None:
                parts = shard.slices(group.rank, group.size)
                whole = torch.cat(
                    [whole.narrow(shard.dim, s.start, s.stop - s.start) for s in parts], shard.dim
                )
            gradient: Any = own[name].grad
            assert gradient is not None, name
            worst = max(worst, difference(gradient.full_tensor() if fsdp else gradient, whole))
        found["gradients"] = worst
        norm = torch.stack([x.norm() for x in expected["gradients"].values()]).norm()
        found["norm"] = difference(model.clip_grad_norm_(float(norm) / 4), norm)
        found["clipped norm"] = difference(model.clip_grad_norm_(1e9) * 4, norm)
        if case.get("step"):
            with torch.no_grad():
                for parameter in own.values():
                    if parameter.grad is not None:
                        parameter -= parameter.grad
            model.save_pretrained(folder / "saved")
        found["missing gradients"] = sorted(
            {n for n, p in own.items() if p.grad is not None} - expected["gradients"].keys()
        )
    if "tokens" in expected and not fsdp:
        found["tokens"] = generated(model, case["inputs"]) == expected["tokens"]
    if case.get("save"):
        twin = copy.deepcopy(model)
        same = {name: x.detach() for name, x in outputs(twin, case["inputs"]).items()}
        found["copy"] = max(difference(value, outs[name].detach()) for name, value in same.items())
        model.save_pretrained(folder / "saved", max_shard_size=20_000)
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    for case in sorted(path.parent for path in folder.glob("*/case.pt")):
        try:
            found[case.name] = checked(case)
        except Exception as error:
            traceback.print_exc()
            found[case.name] = {"error": f"{type(error).__name__}: {error}"}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


# ---------------------------------------------------------------------------- in the test


def run(arguments: list[str], world: int, seconds: float, output: Path) -> None:
    """Run `python *arguments` in `world` processes as torchrun does; AssertionError with their output if one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    logs = [output / f"{rank}.txt" for rank in range(world)]
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            codes = [process.poll() for process in processes]
            if None not in codes or any(codes):
                break
            time.sleep(0.02)
        assert codes == [0] * world, "\n".join(log.read_text()[-4000:] for log in logs)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def in_processes(folder: Path, world: int, seconds: float = 100) -> list[dict[str, Any]]:
    """The results of `main` by rank."""
    run([__file__, str(folder), str(seconds)], world, seconds, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def write_case(
    folder: Path,
    model: Any,
    inputs: dict[str, Any],
    *,
    gradients: bool = True,
    save: bool = False,
    **options: Any,
) -> None:
    """Write a case: the checkpoint of a model, and what that model computes after loading with these options."""
    model.save_pretrained(folder)
    whole = type(model).from_pretrained(folder, **options)
    torch.save(
        {
            "class": type(model).__name__,
            "options": options,
            "inputs": inputs,
            "expected": expectations(whole, inputs, gradients),
            "save": save,
        },
        folder / "case.pt",
    )


if __name__ == "__main__":
    faulthandler.dump_traceback_later(float(sys.argv[2]), exit=True)
    main(Path(sys.argv[1]))
