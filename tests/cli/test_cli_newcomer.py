"""Commands where frameworks are missing: which is used, or what to install, in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import xla_test_flags

from monoblock import demo
from monoblock.pipelines.frameworks import FRAMEWORKS

PACKAGES = {"pt": ("torch",), "flax": ("jax", "flax"), "tf": ("tensorflow", "keras")}
# Python then finds none of these, as if they were not installed.
SITE = """
import sys
from importlib.machinery import PathFinder
found = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {hidden!r} else found(name, path, target)
PathFinder.find_spec = find_spec
"""
LINES = ['pip install "monoblock[torch]"', 'pip install "monoblock[jax]"', 'pip install "monoblock[tf]"']
GREEDY = ("-n", "3", "--temperature", "0")


def run(place: Path, hidden: str, *args: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """The command line where some frameworks, "pt flax tf", are not installed."""
    names = {name for framework in hidden.split() for name in PACKAGES[framework]}
    (place / "sitecustomize.py").write_text(SITE.format(hidden=names))
    path = os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "monoblock.cli", *args],
        capture_output=True,
        text=True,
        input=text,
        timeout=240,
        env={**os.environ, **xla_test_flags.environment(), "PYTHONPATH": path},
    )


ANY = [
    ("generate", "def f():"),
    ("generate", "-m", "someone/model", "x"),
    ("chat",),
    ("embed", "-m", str(demo.path()), "-o", "x.npy"),
]
PYTORCH = [
    ("bench",),
    ("quantize", str(demo.path()), "out"),
    ("quantize", "someone/model", "out"),
    ("info", "--runtime"),
    ("attention", "--layer", "0", "def f():"),
]


@pytest.mark.parametrize("command", ANY)
def test_no_framework(tmp_path: Path, command: tuple[str, ...]) -> None:
    result = run(tmp_path, "pt flax tf", *command, text="hello\n")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"monoblock: monoblock {command[0]} needs PyTorch, JAX or TensorFlow, and none is installed: "
        f"{', or '.join(LINES)}\n"
    )


@pytest.mark.parametrize("command", PYTORCH)
def test_commands_that_run_on_pytorch(tmp_path: Path, command: tuple[str, ...]) -> None:
    for hidden in ("pt", "pt flax tf"):
        result = run(tmp_path, hidden, *command)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith(f"monoblock: monoblock {command[0]}")
        assert result.stderr.endswith(f"runs on PyTorch, which is not installed: {LINES[0]}\n")


@pytest.mark.parametrize("framework", PACKAGES)
def test_the_framework_that_is_asked_for_is_missing(tmp_path: Path, framework: str) -> None:
    result = run(tmp_path, framework, "generate", "--framework", framework, "def f():")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith(f"which is not installed: {FRAMEWORKS[framework].install}\n")


@pytest.mark.parametrize(
    "command",
    [
        ("info",),
        ("env",),
        ("attention", "def f():"),
        ("convert", str(demo.path()), "new"),
        ("--help",),
        ("generate", "--help"),
    ],
)
def test_commands_that_need_none(tmp_path: Path, command: tuple[str, ...]) -> None:
    if command[-1] == "new":
        command = (*command[:-1], str(tmp_path / "new"))
    result = run(tmp_path, "pt flax tf", *command)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_wrong_usage_comes_first(tmp_path: Path) -> None:
    result = run(tmp_path, "pt flax tf", "generate", "--framework", "jax", "x")
    assert result.returncode == 2
    assert "'pt', 'flax', 'tf'" in result.stderr


def installed(framework: str) -> bool:
    return FRAMEWORKS[framework].missing() is None


@pytest.mark.skipif(not all(map(installed, PACKAGES)), reason="needs all frameworks")
def test_the_first_that_is_there_is_used(tmp_path: Path) -> None:
    """The same text on each."""
    texts: list[str] = []
    for hidden in ("", "pt", "pt flax"):
        found = run(tmp_path, hidden, "generate", "def add(a, b):", *GREEDY, "--stop", "never there")
        assert found.returncode == 0, found.stderr
        assert "tokens in" in found.stderr
        texts.append(found.stdout)
    assert len(set(texts)) == 1
    assert texts[0].strip()


@pytest.mark.skipif(not all(map(installed, PACKAGES)), reason="needs all frameworks")
@pytest.mark.parametrize("framework", ["flax", "tf"])
def test_chat_and_options(tmp_path: Path, framework: str) -> None:
    path = tmp_path / "talk.json"
    where = ("--framework", framework, "--device", "cpu", "--dtype", "float32")
    result = run(tmp_path, "pt", "chat", *GREEDY, *where, "--history", str(path), text="def f():\ndef g():\n")
    assert result.returncode == 0, result.stderr
    turns = json.loads(path.read_text())["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    assert result.stdout.strip()
    refused = run(tmp_path, "", "generate", "--framework", framework, "--quantize", "int8", "x")
    assert refused.returncode == 2
    assert "--quantize needs PyTorch" in refused.stderr
    if framework == "flax":
        wrong = run(tmp_path, "", "generate", "--framework", framework, "--device", "nowhere", "x")
        assert wrong.returncode == 1
        assert "is no device here" in wrong.stderr
