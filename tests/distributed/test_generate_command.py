"""`monoblock generate --tensor-parallel N` starts its processes itself."""

from __future__ import annotations

import subprocess
import sys

import pytest


def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from monoblock.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "generate",
        "def add(a, b):",
        "-n",
        "12",
        "--device",
        "cpu",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize(
    "options", [("-t", "0"), ("-t", "0.8", "--seed", "3"), ("-t", "0", "--quantize", "lossless")]
)
def test_the_text_is_that_of_one_process(options: tuple[str, ...]) -> None:
    one, two = generate(*options), generate(*options, "--tensor-parallel", "2")
    assert two.returncode == 0, two.stderr
    assert one.stdout == two.stdout
    assert " tokens in " in two.stderr


def test_without_a_seed_the_processes_sample_the_same_tokens() -> None:
    found = generate("-t", "1", "--tensor-parallel", "3")
    assert found.returncode == 0, found.stderr


def test_errors_are_one_line() -> None:
    found = generate("--tensor-parallel", "7")
    assert found.returncode == 1
    assert (
        "--tensor-parallel=7: the " in found.stderr
        and "do not divide into 7 shards: give 1 or " in found.stderr
    )
    assert len(found.stderr.splitlines()) == 1
    found = generate("--tensor-parallel", "2", "--quantize", "int8")
    assert found.returncode == 1
    assert "quantization_config with groups of 128: a shard of the" in found.stderr
    assert generate("--tensor-parallel", "0").returncode == 2
    assert generate("--tensor-parallel", "2", "--framework", "flax").returncode == 2
