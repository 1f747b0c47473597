"""`monoblock quantize` and `--quantize`: files, output, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from monoblock import demo

pytest.importorskip("torch")
PROMPT = ("def add(a, b):", "-n", "4", "--temperature", "0", "--no-echo")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "monoblock.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=240)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded demo in int4, and the output of the command."""
    path = tmp_path_factory.mktemp("quantised") / "demo"
    result = run(
        "quantize", str(demo.path()), str(path), "--bits", "4", "--group-size", "64", "--keep", "Wqkv"
    )
    assert result.returncode == 0, result.stderr
    path.with_suffix(".out").write_text(result.stdout)
    path.with_suffix(".err").write_text(result.stderr)
    return path


def test_quantised_folder_and_output(quantised: Path) -> None:
    rows = dict(line.split(": ", 1) for line in quantised.with_suffix(".out").read_text().splitlines()[1:])
    assert rows["class"] == "MptForCausalLM" and rows["parameters"] == "5,163,552"
    assert rows["quantisation"].startswith("int4, groups of 64") and rows["dtype"] == "bfloat16"
    columns = rows["weights"].replace(",", "").split()
    after, before = int(columns[0]), int(columns[3])
    assert after < 0.6 * before  # the fused q, k, v projections are not quantised
    assert quantised.with_suffix(".err").read_text().splitlines() == ["quantising ...", "writing ..."]
    names = {path.name for path in Path(demo.path()).iterdir() if path.suffix == ".json"}
    assert names < {path.name for path in quantised.iterdir()}
    for name in names - {"config.json"}:
        assert (quantised / name).read_bytes() == (Path(demo.path()) / name).read_bytes()
    quantization = json.loads((quantised / "config.json").read_text())["quantization_config"]
    assert quantization == {
        "method": "monoblock",
        "bits": 4,
        "group_size": 64,
        "modules_to_not_convert": ["Wqkv"],
    }


def test_generate_and_info_of_a_quantised_folder(quantised: Path) -> None:
    result = run("generate", "-m", str(quantised), *PROMPT)
    assert result.returncode == 0 and result.stdout.strip()
    info = run("info", str(quantised))
    assert "quantisation: int4, groups of 64; embedding and head in int8; not Wqkv" in info.stdout
    found = json.loads(run("info", str(quantised), "--json").stdout)
    assert found["quantization"]["bits"] == 4 and found["stored"]["U8"] > 0
    assert "quantisation" not in run("info").stdout


def test_12_bits_are_lossless(tmp_path: Path) -> None:
    result = run("quantize", str(demo.path()), str(tmp_path / "demo"), "--bits", "12")
    assert result.returncode == 0 and "quantisation: bfloat16 in 12 bits, without loss" in result.stdout
    texts = [run("generate", "-m", str(name), *PROMPT).stdout for name in (demo.path(), tmp_path / "demo")]
    assert texts[0] == texts[1] != ""
    assert "quantisation: bfloat16 in 12 bits, without loss" in run("info", str(tmp_path / "demo")).stdout
    refused = run("quantize", str(demo.path()), str(tmp_path / "b"), "--bits", "12", "--group-size", "64")
    assert refused.returncode != 0 and "no groups" in refused.stderr


def test_quantize_while_loading() -> None:
    result = run("generate", *PROMPT, "--quantize", "int8")
    assert result.returncode == 0 and result.stdout.strip()
    wrong = run("generate", *PROMPT, "--quantize", "int3")
    assert wrong.returncode == 2 and "int8" in wrong.stderr
    assert run("attention", "a b", "--quantize", "int8").returncode == 2


def test_errors_are_one_line(quantised: Path, tmp_path: Path) -> None:
    for args, message in (
        ((str(demo.path()), str(quantised)), "holds files already"),
        ((str(quantised), str(tmp_path / "b")), "holds quantised weights already"),
        ((str(demo.path()), str(tmp_path / "b"), "--keep", "nothing"), "no module of this model"),
        ((str(quantised), str(quantised), "--force"), "choose another target"),
    ):
        result = run("quantize", *args)
        assert result.returncode == 1 and message in result.stderr and result.stdout == "", result.stderr
        errors = [line for line in result.stderr.splitlines() if not line.endswith("...")]
        assert len(errors) == 1 and errors[0].startswith("monoblock: ")
    assert list(tmp_path.iterdir()) == []  # no folder remains
    assert run("quantize", str(demo.path()), str(tmp_path / "b"), "--bits", "3").returncode == 2
    assert run("quantize", str(demo.path()), str(tmp_path / "b"), "--max-shard-size", "x").returncode == 2
