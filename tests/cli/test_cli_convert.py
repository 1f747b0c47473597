"""`monoblock convert`: output, progress, exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import upstream_releases as made
from terminal import Terminal

from monoblock.cli.convert import From, To
from monoblock.conversion.convert import FORMATS


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "monoblock.cli", "convert", *args]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.mistral_release(tmp_path_factory.mktemp("source") / "release")


def test_formats_equal_those_of_the_library() -> None:
    assert {member.value for member in From} == {"auto", *FORMATS}
    assert {member.value for member in To} == {name for name, form in FORMATS.items() if form.write}


def test_a_conversion_in_a_pipe(release: Path, tmp_path: Path) -> None:
    result = run(str(release), str(tmp_path / "b"), "--dtype", "bfloat16", "--kv-heads", "1", "--check")
    assert result.returncode == 0, result.stderr
    rows = dict(line.split(": ", 1) for line in result.stdout.splitlines()[1:])
    assert (rows["from"], rows["to"], rows["class"]) == ("mistral", "hub", "MistralForCausalLM")
    assert rows["dtype"] == "bfloat16"
    assert "model.safetensors" in rows["files"]
    assert rows["tensors"].endswith("from rounding")
    assert "argmax" in rows["logits"]
    assert result.stderr.splitlines() == ["writing ...", "writing: done", "checking ...", "checking: done"]


def test_progress_in_a_terminal(release: Path, tmp_path: Path) -> None:
    args = ("-m", "monoblock.cli", "convert", str(release), str(tmp_path / "b"))
    with Terminal(args, env={"TERM": "xterm"}) as terminal:
        terminal.expect("writing")
        terminal.expect("MistralForCausalLM")
        assert terminal.end() == 0


def test_errors_are_one_line(release: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").write_text("x")
    result = run(str(release), str(tmp_path / "b"))
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("monoblock: ") and "--force" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert run(str(release), str(tmp_path / "b"), "--force").returncode == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--dtype", "int8"), "int8"),
        (("--from", "gguf"), "gguf"),
        (("--to", "llm-foundry"), "llm-foundry"),
        (("--kv-heads", "0"), "--kv-heads"),
        (("--max-shard-size", "much"), "much"),
    ],
)
def test_usage_errors(release: Path, tmp_path: Path, args: tuple[str, ...], message: str) -> None:
    result = run(str(release), str(tmp_path / "b"), *args)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "b").exists()
