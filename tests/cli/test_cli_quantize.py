"""`monoblock quantize` and `--quantize`: what they make, say and refuse."""

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
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded demo in 4 bits, with what the command said."""
    place = tmp_path_factory.mktemp("quantised") / "demo"
    result = run(
        "quantize", str(demo.path()), str(place), "--bits", "4", "--group-size", "64", "--keep", "Wqkv"
    )
    assert result.returncode == 0, result.stderr
    place.with_suffix(".out").write_text(result.stdout)
    place.with_suffix(".err").write_text(result.stderr)
    return place


def test_a_folder_is_made_and_the_command_tells(packed: Path) -> None:
    rows = dict(line.split(": ", 1) for line in packed.with_suffix(".out").read_text().splitlines()[1:])
    assert rows["class"] == "MptForCausalLM" and rows["parameters"] == "5,163,552"
    assert rows["quantisation"].startswith("int4, groups of 64") and rows["dtype"] == "bfloat16"
    words = rows["weights"].replace(",", "").split()
    after, before = int(words[0]), int(words[3])
    assert after < 0.6 * before  # the fused q, k and v are kept
    assert packed.with_suffix(".err").read_text().splitlines() == ["quantising ...", "writing ..."]
    names = {path.name for path in Path(demo.path()).iterdir() if path.suffix == ".json"}
    assert names < {path.name for path in packed.iterdir()}
    for name in names - {"config.json"}:
        assert (packed / name).read_bytes() == (Path(demo.path()) / name).read_bytes()
    how = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert how == {
        "method": "monoblock",
        "bits": 4,
        "group_size": 64,
        "modules_to_not_convert": ["Wqkv"],
    }


def test_the_folder_generates_and_info_tells(packed: Path) -> None:
    result = run("generate", "-m", str(packed), *PROMPT)
    assert result.returncode == 0 and result.stdout.strip()
    info = run("info", str(packed))
    assert "quantisation: int4, groups of 64; embedding and head in int8; not Wqkv" in info.stdout
    found = json.loads(run("info", str(packed), "--json").stdout)
    assert found["quantization"]["bits"] == 4 and found["stored"]["U8"] > 0
    assert "quantisation" not in run("info").stdout


def test_without_loss(tmp_path: Path) -> None:
    """12 bits: the same text; `info` says what it is."""
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


def test_errors_are_one_sentence(packed: Path, tmp_path: Path) -> None:
    for args, words in (
        ((str(demo.path()), str(packed)), "holds files already"),
        ((str(packed), str(tmp_path / "b")), "holds quantised weights already"),
        ((str(demo.path()), str(tmp_path / "b"), "--keep", "nothing"), "no module of this model"),
        ((str(packed), str(packed), "--force"), "choose another target"),
        (("convert", str(packed), str(tmp_path / "b")), "holds quantised weights"),
    ):
        result = run(*(args if args[0] == "convert" else ("quantize", *args)))
        assert result.returncode == 1 and words in result.stderr and result.stdout == "", result.stderr
        errors = [line for line in result.stderr.splitlines() if not line.endswith("...")]
        assert len(errors) == 1 and errors[0].startswith("monoblock: ")
    assert list(tmp_path.iterdir()) == []  # no folder, whole or half
    assert run("quantize", str(demo.path()), str(tmp_path / "b"), "--bits", "3").returncode == 2
    assert run("quantize", str(demo.path()), str(tmp_path / "b"), "--max-shard-size", "x").returncode == 2
