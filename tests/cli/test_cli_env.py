"""`monoblock env`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest


def run(*args: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-m", "monoblock.cli", "env", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


def test_json() -> None:
    found = json.loads(run("--json").stdout)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["numpy"] == version("numpy")
    assert found["threads"] == len(os.sched_getaffinity(0))
    assert found["memory"] > 2**20
    try:
        expected = {"torch": version("torch")}
    except PackageNotFoundError:
        expected = None
    assert found["PyTorch"] == expected


def test_plain_lines_in_a_pipe() -> None:
    lines = run().stdout.splitlines()
    assert f"numpy: {version('numpy')}" in lines
    assert not any("\x1b" in line for line in lines)


def test_imports_no_framework() -> None:
    report = run(options=("-X", "importtime")).stderr
    imported = {line.rpartition("|")[2].strip() for line in report.splitlines()}
    assert "json" in imported  # the report was parsed
    assert not imported & {"torch", "jax", "tensorflow", "numpy", "huggingface_hub"}


def test_no_gpus_are_listed_if_nvidia_smi_fails(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from monoblock.cli import env

    monkeypatch.setattr(env.shutil, "which", lambda _: f"{tmp_path}/nvidia-smi")
    monkeypatch.setattr(env.sys, "platform", "linux")
    assert env.describe()["gpus"] == []
