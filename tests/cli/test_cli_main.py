"""The command line: help, imports, usage errors."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

COMMANDS = ("generate", "chat", "embed", "search", "attention", "info", "convert", "bench", "env")


def run(*args: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-m", "monoblock.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)


def test_help_lists_commands_and_exit_codes() -> None:
    result = run("--help")
    assert result.returncode == 0
    for command in COMMANDS:
        assert f"\n  {command} " in result.stdout
    text = " ".join(result.stdout.split())
    for code in ("0 success", "1 error of the model", "2 usage error", "130 interrupted", "141 broken pipe"):
        assert code in text


@pytest.mark.parametrize("args", [(), *((command,) for command in COMMANDS)])
def test_help_imports_no_slow_module(args: tuple[str, ...]) -> None:
    result = run(*args, "--help", options=("-X", "importtime"))
    assert result.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "typer" in imported  # the report was parsed
    slow = {"torch", "jax", "tensorflow", "numpy", "tokenizers", "safetensors", "huggingface_hub", "jinja2"}
    assert not imported & (slow | {"rich.markdown", "rich.console", "monoblock.config"})


def test_version() -> None:
    assert run("--version").stdout == f"monoblock {version('monoblock')}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("generat",), "Did you mean 'generate'"),
        (("generate", "x", "--temperature", "warm"), "--temperature"),
        (("generate", "x", "--temperature", "-1"), "--temperature"),
        (("generate", "x", "--top-p", "1.5"), "--top-p"),
        (("generate", "x", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("generate", "x", "--dtype", "float12"), "float12"),
        (("generate", "x", "--temperature", "0", "--top-k", "5"), "--top-k"),
        (("chat", "--temperature", "0", "--top-p", "0.5"), "--top-p"),
        (("generate", "x", "--file", "y"), "not both"),
        (("generate", ""), "empty"),
        (("generate",), "empty"),
        (("chat", "model", "stray"), "stray"),
        (("chat", "model", "--model", "other"), "two models"),
        (("chat", "model", "http://localhost:8000"), "runs the model in this process"),
        (("chat", "model", "max_new_token=3"), "did you mean max_new_tokens"),
        (("chat", "model", "top_p=7"), "at most 1"),
        (("chat", "temperature=0.5", "do_sample=False"), "drop it or temperature"),
        (("chat", "temperature=0.5", "-t", "0.5"), "given twice"),
    ],
)
def test_usage_errors_exit_with_2(args: tuple[str, ...], message: str) -> None:
    result = run(*args)
    assert result.returncode == 2
    assert message in result.stderr
    assert not result.stdout
    assert "Traceback" not in result.stderr
