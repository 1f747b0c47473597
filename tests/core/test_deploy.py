"""docs/deploy.md: manifests that parse and fit together, and commands that the command line has."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
from packaging.requirements import Requirement

from monoblock.cli.app import COMMANDS

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
MANIFESTS = {m["kind"]: m for kind, text in BLOCKS if kind == "yaml" for m in yaml.safe_load_all(text)}
[DOCKERFILE] = [text.replace("\\\n", " ") for kind, text in BLOCKS if kind == "dockerfile"]


def pod(kind: str) -> Any:
    return MANIFESTS[kind]["spec"]["template"]["spec"]


def commands() -> list[list[str]]:
    """The arguments of `monoblock` in the Dockerfile and the manifests."""
    [cmd] = re.findall(r"^CMD (\[.*\])$", DOCKERFILE, flags=re.MULTILINE)
    [server] = pod("Deployment")["containers"]
    name, *job = shlex.split(MANIFESTS["RayJob"]["spec"]["entrypoint"])
    assert name == "monoblock" and 'ENTRYPOINT ["monoblock"]' in DOCKERFILE
    return [json.loads(cmd), server["args"], job]


@pytest.mark.parametrize("args", commands(), ids=lambda args: args[0])
def test_commands_parse(args: list[str]) -> None:
    """By the command line itself, without running them."""
    name, *rest = args
    assert name in COMMANDS
    command = typer.main.get_command(importlib.import_module(f"monoblock.cli.{name}").app)
    with command.make_context(name, list(rest)) as context:
        given = context.params
    if name == "batch":
        assert (given["ray"], given["replicas"]) == ("auto", 4)
    else:
        assert (given["host"], given["port"]) == ("0.0.0.0", 8000)


def test_the_server_can_end_its_requests_before_it_is_killed() -> None:
    spec = pod("Deployment")
    [server] = spec["containers"]
    drain = int(server["args"][server["args"].index("--drain-timeout") + 1])
    before = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    assert drain + before < spec["terminationGracePeriodSeconds"]
    assert server["resources"]["requests"]["cpu"] == next(
        variable["value"] for variable in server["env"] if variable["name"] == "OMP_NUM_THREADS"
    )


def test_manifests_refer_to_each_other() -> None:
    assert MANIFESTS.keys() == {"Deployment", "Service", "HorizontalPodAutoscaler", "RayService", "RayJob"}
    deployment, scaler = MANIFESTS["Deployment"], MANIFESTS["HorizontalPodAutoscaler"]["spec"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert labels == deployment["spec"]["selector"]["matchLabels"] == MANIFESTS["Service"]["spec"]["selector"]
    target = scaler["scaleTargetRef"]
    assert (target["kind"], target["name"]) == (deployment["kind"], deployment["metadata"]["name"])
    assert "replicas" not in deployment["spec"]  # the autoscaler sets them
    [server] = pod("Deployment")["containers"]
    ports = {port["name"] for port in server["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        check = server[probe].get("httpGet") or server[probe]["tcpSocket"]
        assert check["port"] in ports and check.get("path", "/health") == "/health"
    clusters = [
        MANIFESTS["RayJob"]["spec"]["rayClusterSpec"],
        MANIFESTS["RayService"]["spec"]["rayClusterConfig"],
    ]
    groups = [group for c in clusters for group in (c["headGroupSpec"], *c["workerGroupSpecs"])]
    for spec in [pod("Deployment"), *(group["template"]["spec"] for group in groups)]:
        volumes = {volume["name"] for volume in spec["volumes"]}
        assert {m["name"] for c in spec["containers"] for m in c["volumeMounts"]} == volumes


def build_app_arguments() -> dict[str, str]:
    """The fields of `ServeArguments` with their types, read from the source, since Ray may not be installed."""
    source = ROOT / "src" / "monoblock" / "cluster" / "serve.py"
    [found] = [
        node
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "ServeArguments"
    ]
    fields = [node for node in found.body if isinstance(node, ast.AnnAssign)]
    return {ast.unparse(field.target): ast.unparse(field.annotation) for field in fields}


def test_the_service_on_ray() -> None:
    spec = MANIFESTS["RayService"]["spec"]
    serve = yaml.safe_load(spec["serveConfigV2"])
    [app] = serve["applications"]
    module, _, name = app["import_path"].partition(":")
    source = (ROOT / "src" / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
    assert f"def {name}(" in source
    known = build_app_arguments()
    for argument, value in app["args"].items():
        kinds = known[argument].split(" | ")
        assert type(value).__name__ in kinds or (isinstance(value, int) and "float" in kinds)
    # The head has no CPUs for replicas, each worker has those of one, and there are enough workers.
    cluster = spec["rayClusterConfig"]
    [group] = cluster["workerGroupSpecs"]
    [worker] = group["template"]["spec"]["containers"]
    assert (
        cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0" and cluster["enableInTreeAutoscaling"]
    )
    assert int(worker["resources"]["limits"]["cpu"]) == app["args"]["threads"]
    assert group["minReplicas"] == app["args"]["replicas"]
    assert group["maxReplicas"] == app["args"]["max_replicas"]
    [head] = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert {port["containerPort"] for port in head["ports"]} == {serve["http_options"]["port"]}


def test_versions_and_extras_are_the_project_s() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [named] = re.findall(r"\.whl\)\[([\w,]+)\]", DOCKERFILE)
    assert set(named.split(",")) <= extras.keys()
    version = MANIFESTS["RayJob"]["spec"]["rayClusterSpec"]["rayVersion"]
    assert MANIFESTS["RayService"]["spec"]["rayClusterConfig"]["rayVersion"] == version
    assert Requirement(extras["ray"][0]).specifier.contains(version)
    assert f"\nray=={version}\n" in (ROOT / "constraints.txt").read_text()


def test_the_dockerfile_copies_files_that_exist_and_runs_as_a_user() -> None:
    for line in DOCKERFILE.splitlines():
        match line.split():
            case ["COPY", source, _] if source != ".":
                assert (ROOT / source).exists()
            case _:
                pass
    assert re.search(r"^USER (?!root)", DOCKERFILE, flags=re.MULTILINE)
    assert set(re.findall(r"^([A-Z]+) ", DOCKERFILE, flags=re.MULTILINE)) <= {
        "FROM", "RUN", "COPY", "USER", "WORKDIR", "EXPOSE", "ENTRYPOINT", "CMD",
    }  # fmt: skip
