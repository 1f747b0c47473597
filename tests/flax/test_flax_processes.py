"""Two processes on a mesh of 2 x 2 devices load, train, generate and save as one process does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import flax_multiprocess
import numpy as np
import pytest
from flax_multiprocess import GREEDY, OPTIMIZER, RATE, SAMPLED
from flax_tiny import batch, tiny
from measure import EPS, assert_close, largest, rounding

from monoblock import FlaxMistralForCausalLM
from monoblock.backends.flax.loading import flat

NUMBERS = (0, 1)
SECONDS = 120  # timeout of each process; they take 15 where two cores are free


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of each process by number, "folder" for their files, and "alone" for those of this process."""
    folder = tmp_path_factory.mktemp("processes")
    model = tiny("FlaxMistralForCausalLM")
    model.save_pretrained(folder / "start")
    with socket.socket() as held:
        # Held until the coordinator has bound it too, so that no other program takes the port.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        processes = [started(number, held.getsockname()[1], folder) for number in NUMBERS]
        try:
            results: dict[Any, Any] = {"folder": folder, "alone": alone(model)}
            codes = ended(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    outputs = [(folder / f"{number}.txt").read_text() for number in NUMBERS]
    assert codes == [0, 0], "\n".join(outputs)
    for number in NUMBERS:
        with np.load(folder / f"{number}.npz") as arrays:
            results[number] = dict(arrays)
    return results


def ended(processes: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """Exit codes; None for processes that still run at the timeout, or when another one has failed."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return codes
        time.sleep(0.05)
    return [process.poll() for process in processes]


def started(number: int, port: int, folder: Path) -> subprocess.Popen[bytes]:
    script = Path(flax_multiprocess.__file__)
    paths = [str(script.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, str(script), str(number), str(port), str(folder), str(SECONDS)]
    with (folder / f"{number}.txt").open("wb") as output:
        return subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)


def alone(model: Any) -> dict[str, Any]:
    """The same on one device, and "rounding": the relative error of a different order of summation."""
    inputs = batch()
    out = model(**inputs, output_hidden_states=True)
    result: dict[str, Any] = {"logits": out.logits, "rounding": rounding(model.spec, out) / largest(out)}
    result["loss"], params, state = flax_multiprocess.step(model)(
        model.params, OPTIMIZER.init(model.params), inputs
    )
    result |= {"params": tree(params), "gradients": tree(state[0].trace)}
    result["after"] = model(**inputs, params=params).logits
    for name, options in (("greedy", GREEDY), ("sampled", SAMPLED)):
        result[name] = model.generate(**inputs, params=params, **options).sequences
    return result


def with_prefix(arrays: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix + "/"): x for name, x in arrays.items() if name.startswith(prefix + "/")}


def tree(params: Any) -> dict[str, Any]:
    return {"/".join(path): np.asarray(leaf) for path, leaf in flat(params).items()}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_process_holds_only_its_shards(number: int, found: dict[str, Any]) -> None:
    """The tensor axis spans the processes: each has half of every matrix of the layers and of the embedding tables."""
    whole, halves = found["alone"]["params"], 0
    for name, shapes in with_prefix(found[number], "held").items():
        sizes = {int(np.prod(shape)) for shape in shapes}
        halved = name.endswith(("kernel", "embedding"))
        assert sizes == {whole[name].size // (2 if halved else 1)}, name
        halves += halved
    assert halves == 2 * 7 + 2


@pytest.mark.parametrize("number", NUMBERS)
def test_logits_and_training_step_equal_one_process(number: int, found: dict[str, Any]) -> None:
    ours, theirs = found[number], found["alone"]
    bound = theirs["rounding"] * largest(theirs["logits"])
    assert_close("two processes: loss", ours["loss"], theirs["loss"], bound)
    for name in ("logits", "after"):  # the latter on the mesh that Orbax restored to, with explicit axes
        assert_close(f"two processes: {name}", ours[name], theirs[name], bound)
    momentum, params = with_prefix(ours, "momentum"), with_prefix(ours, "params")
    assert momentum.keys() == params.keys() == theirs["params"].keys()
    # The backward pass has two products for each one of the forward pass.
    bound = 3 * theirs["rounding"] * largest(list(theirs["gradients"].values()))
    for name, gradient in theirs["gradients"].items():
        assert_close(f"two processes: gradient of {name}", momentum[name], gradient, bound)
        assert_close(f"two processes: {name}", params[name], theirs["params"][name], RATE * bound + EPS)
        assert np.abs(gradient).max() > 100 * bound, name


@pytest.mark.parametrize("number", NUMBERS)
def test_generated_tokens_equal_one_process(number: int, found: dict[str, Any]) -> None:
    ours, theirs = found[number], found["alone"]
    for name, expected in (("greedy", "greedy"), ("stepwise", "greedy"), ("sampled", "sampled")):
        np.testing.assert_array_equal(ours[name], theirs[expected], err_msg=name)
    assert (ours["sampled"] != ours["greedy"]).any()


def test_one_process_saves_and_the_others_wait(found: dict[str, Any]) -> None:
    saved = found["folder"] / "saved"
    for number in NUMBERS:
        assert {"config.json", "model.safetensors"} <= set(found[number]["files"].tolist())
    loaded = tree(FlaxMistralForCausalLM.from_pretrained(saved).params)
    for name, expected in with_prefix(found[0], "params").items():
        np.testing.assert_array_equal(loaded[name], expected, err_msg=name)
    assert [path.name for path in saved.parent.glob(".monoblock*")] == []


def test_a_failed_save_raises_in_every_process(found: dict[str, Any]) -> None:
    assert str(found[0]["failed"]).startswith("ValueError: max_shard_size='large'")
    assert str(found[1]["failed"]).startswith("CheckpointError: process 0 could not save the model")
    assert not (found["folder"] / "failed").exists()


def test_processes_without_shards_raise(found: dict[str, Any]) -> None:
    """Parameters on process 0's devices: it can save them alone, and the other process raises."""
    assert "local" not in found[0]
    assert (found["folder"] / "local" / "model.safetensors").is_file()
    assert str(found[1]["local"]).startswith(
        "the parameters are on devices of 1 of 2 processes: save from a mesh"
    )


@pytest.mark.parametrize("mesh", ["same", "other"])
def test_orbax_round_trip(mesh: str, found: dict[str, Any]) -> None:
    for number in NUMBERS:
        restored = with_prefix(found[number], mesh)
        for name, expected in with_prefix(found[number], "params").items():
            np.testing.assert_array_equal(restored[name], expected, err_msg=name)
