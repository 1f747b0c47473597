"""`monoblock finetune`: output, recipes, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("yaml")

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}  # other tests run beside these
FAST = ("--max-length", "32", "--batch-size", "2", "--learning-rate", "1e-3", "--device", "cpu")


def run(*args: str | Path, command: tuple[str, ...] = ("finetune",)) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "monoblock.cli", *command, *map(str, args)]
    return subprocess.run(
        line, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=ENV, timeout=240
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text("def add(a, b):\n    return a + b\n\n\n" * 20)
    return path


def test_a_text_file_becomes_a_model(data: Path, tmp_path: Path) -> None:
    """The embedded demo, by a recipe that the command line overrides."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {data}\nmax_steps: 9\nlearning_rate: 0.001\neval_fraction: 0.2\n")
    output = tmp_path / "out"
    samples = ("--sample-prompt", "def add", "--sample-prompt", "return", "--sample-tokens", "2")
    result = run("--recipe", recipe, "--output", output, "--max-steps", "3", *samples, *FAST)
    assert result.returncode == 0, result.stderr
    title, *rows = result.stdout.splitlines()
    found = dict(row.split(": ") for row in rows)
    assert title == f"# {output}" and found["steps"] == "3"
    assert {"loss", "evaluation loss", "evaluation perplexity"} < found.keys()
    assert result.stderr.splitlines()[0] == "loading ..." and "tokens/s, 0:00 left" in result.stderr
    assert {"model.safetensors", "tokenizer.json", "recipe.yaml", "metrics.jsonl", "curves.svg"} <= {
        path.name for path in output.iterdir()
    }
    assert "step 0, 'def add': '" in result.stderr and "step 3, 'return': '" in result.stderr
    assert len((output / "samples.jsonl").read_text().splitlines()) == 4
    assert "evaluation loss" in (output / "curves.svg").read_text()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    shown = run("--recipe", output / "recipe.yaml", "--show-recipe", "--seed", "5")
    assert shown.returncode == 0 and "max_steps: 3\n" in shown.stdout and "seed: 5\n" in shown.stdout
    command = ["evaluate", "--model", str(output), "--data", str(data), "--max-length", "32", "--json"]
    evaluated = run(*command, command=())
    assert evaluated.returncode == 0, evaluated.stderr
    values = json.loads(evaluated.stdout)
    assert set(values) == {"loss", "perplexity"} and values["loss"] < 2
    again = run("--recipe", output / "recipe.yaml")
    assert again.returncode == 1 and "holds the checkpoints of another run" in again.stderr


def test_the_command_of_the_documentation(tmp_path: Path) -> None:
    """The first one of docs/training.md, with two steps."""
    root = Path(__file__).parents[2]
    page = (root / "docs" / "training.md").read_text(encoding="utf-8")
    command = page.partition("```sh\nmonoblock finetune ")[2].partition("\n")[0].split()
    command[command.index("--data") + 1] = str(root / "docs" / "demo.md")
    command[command.index("--output") + 1] = str(tmp_path / "out")
    command[command.index("--max-steps") + 1] = "2"
    result = run(*command, "--max-length", "32", "--device", "cpu")
    assert result.returncode == 0 and "evaluation perplexity: " in result.stdout, result.stderr


def test_usage_errors(data: Path, tmp_path: Path) -> None:
    for args, code, message in (
        (("--data", data), 2, "--output is needed"),
        (("--task", "sing"), 2, "task must be one of"),
        (
            ("--data", tmp_path / "none.txt", "--output", tmp_path / "out"),
            1,
            "there is no such file or folder",
        ),
        (("--recipe", data), 1, "is not an option of a recipe"),
    ):
        result = run(*args)
        assert result.returncode == code and message in " ".join(result.stderr.split())
        assert "Traceback" not in result.stderr


def test_a_signal_ends_the_run_with_a_checkpoint(data: Path, tmp_path: Path) -> None:
    """The exit code is that of the signal."""
    output = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "monoblock.cli",
        "finetune",
        "--data",
        str(data),
        "--output",
        str(output),
    ]
    with subprocess.Popen(
        [*command, *FAST, "--max-steps", "100000"], stderr=subprocess.PIPE, text=True
    ) as process:
        metrics, end = output / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        message = process.stderr.read()
        assert process.wait(60) == 143
    assert "--resume continues there" in message and "Traceback" not in message
    (checkpoint,) = (output / "checkpoints").iterdir()
    assert (checkpoint / "model.safetensors").is_file() and not (output / "model.safetensors").exists()
