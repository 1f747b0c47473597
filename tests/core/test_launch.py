"""The processes that launchers start for fine-tuning: their environment, and layouts of devices."""

from __future__ import annotations

import json
from typing import Any

import pytest

from monoblock.training import TrainingOptions
from monoblock.training.processes import Launch, launch, processes, reports

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "3",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29400",
}
JAX = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


def config(kind: str, index: int, **counts: int) -> dict[str, str]:
    """TF_CONFIG of a task in a cluster with so many tasks of each kind."""
    cluster = {name: [f"10.0.0.1:{port}" for port in range(count)] for name, count in counts.items()}
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})}


@pytest.fixture(autouse=True)
def _without(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, *JAX, "TF_CONFIG", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)


def setting(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("framework", "values", "expected"),
    [
        ("pt", {}, Launch()),
        ("pt", TORCHRUN, Launch(1, 3, "10.0.0.1:29400")),
        ("flax", TORCHRUN, Launch(1, 3, "10.0.0.1:29400")),
        # The agent of torchrun has taken the port.
        ("flax", {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}, Launch(1, 3, "10.0.0.1:29401")),
        ("flax", JAX, Launch(1, 2, "10.0.0.1:1234")),
        ("flax", {**TORCHRUN, **JAX}, Launch(1, 2, "10.0.0.1:1234")),
        ("flax", {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, Launch(0, 1, None)),
        ("pt", JAX, Launch()),
        ("tf", config("worker", 1, worker=3), Launch(1, 3)),
        ("tf", config("worker", 1, chief=1, worker=2), Launch(2, 3)),
        ("tf", config("chief", 0, chief=1, worker=2), Launch(0, 3)),
        ("tf", config("worker", 0, worker=1), Launch()),
        ("tf", {"TF_CONFIG": "{}"}, Launch()),
    ],
)
def test_the_environment_gives_the_processes(
    framework: str, values: dict[str, str], expected: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting(monkeypatch, values)
    assert launch(framework) == expected


@pytest.mark.parametrize(
    ("framework", "values", "message"),
    [
        (
            "flax",
            JAX | {"JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID=2 and JAX_NUM_PROCESSES=2 of the environment must be",
        ),
        (
            "flax",
            {"JAX_NUM_PROCESSES": "2"},
            "JAX_PROCESS_ID= and JAX_NUM_PROCESSES=2 of the environment must be",
        ),
        ("flax", JAX | {"JAX_COORDINATOR_ADDRESS": "here"}, "JAX_COORDINATOR_ADDRESS=here must be HOST:PORT"),
        ("pt", TORCHRUN | {"RANK": "x"}, "RANK=x and WORLD_SIZE=3 of the environment must be"),
        ("tf", {"TF_CONFIG": "{"}, "TF_CONFIG of the environment is no description of workers"),
        ("tf", {"TF_CONFIG": "[1]"}, "TF_CONFIG of the environment is no description of workers"),
        (
            "tf",
            config("worker", 0, worker=2, ps=1),
            "TF_CONFIG of the environment has a ps: framework=tf trains with",
        ),
        ("tf", config("evaluator", 0, worker=2), "TF_CONFIG of the environment has a evaluator"),
        ("tf", config("worker", 2, worker=2), "TF_CONFIG of the environment: there is no worker 2 among 2"),
        (
            "tf",
            TORCHRUN,
            "framework=tf finds its workers in the environment variable TF_CONFIG, but a launcher started 3",
        ),
    ],
)
def test_wrong_environments_are_refused(
    framework: str, values: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting(monkeypatch, values)
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        processes(TrainingOptions(framework=framework))


def test_fewer_rows_than_workers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    setting(monkeypatch, config("worker", 0, worker=3))
    with pytest.raises(
        ValueError, match="batch_size=2 is divided over 3 processes: give at least one row for each"
    ):
        processes(TrainingOptions(framework="tf", batch_size=2))


def test_one_process_of_a_machine_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(map(reports, ("pt", "flax", "tf")))
    setting(monkeypatch, JAX | config("worker", 0, worker=2))
    assert reports("pt") and not reports("flax") and reports("tf")
    setting(monkeypatch, TORCHRUN | {"LOCAL_RANK": "0"})
    assert reports("pt")
    setting(monkeypatch, {"RANK": "9"})  # an error of its own
    assert reports("pt")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mesh": "data=2"}, "mesh needs framework=flax"),
        (
            {"framework": "flax", "mesh": "rows=2"},
            "mesh must be the devices along the axes data, fsdp, tensor",
        ),
        ({"framework": "flax", "mesh": "data=0"}, "mesh must be the devices along the axes"),
        ({"framework": "flax", "mesh": "data=2,data=2"}, "mesh must be the devices along the axes"),
        ({"framework": "flax", "mesh": "data=2", "parallel": "ddp"}, "parallel has no effect with mesh"),
        (
            {"framework": "flax", "mesh": "data=2", "tensor_parallel": 2},
            "tensor_parallel has no effect with mesh",
        ),
        ({"framework": "tf", "tensor_parallel": 2}, "tensor_parallel needs framework=pt or flax"),
        ({"framework": "tf", "parallel": "fsdp"}, "parallel=fsdp needs framework=pt or flax"),
    ],
)
def test_layouts_that_a_framework_lacks_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**given)


def test_sizes_of_a_mesh() -> None:
    found = TrainingOptions(framework="flax", mesh="tensor=2, data=3")
    assert found.mesh_sizes == {"tensor": 2, "data": 3} and found.has_mesh
    assert not TrainingOptions(framework="flax").has_mesh
    assert TrainingOptions(framework="flax", parallel="ddp").has_mesh
    assert TrainingOptions(framework="tf", parallel="ddp").mesh_sizes == {}
