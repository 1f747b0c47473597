"""Every example of README and docs runs on the embedded model, in the order of its document."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# docs/demo.md quotes what the model writes, which is not always Python. The examples of the others name checkpoints
# that are not here: tests of their own run them on tiny ones (test_convert_docs.py, test_visualizer.py).
ELSEWHERE = {"demo.md", "convert.md", "attention.md"}
DOCUMENTS = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name not in ELSEWHERE)]
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: Path, language: str) -> list[str]:
    found = BLOCK.findall(document.read_text(encoding="utf-8"))
    return [code for kind, code in found if kind == language]


def run(command: list[str], folder: Path) -> None:
    # Commands of the documents are those of this environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        command, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if blocks(d, "python")], ids=lambda path: path.name
)
def test_python_examples(document: Path, tmp_path: Path) -> None:
    run([sys.executable, "-c", "\n".join(blocks(document, "python"))], tmp_path)


COMMANDS = [
    pytest.param(line, id=f"{document.name}: {line}")
    for document in DOCUMENTS
    for line in "\n".join(blocks(document, "sh")).splitlines()
    # Installation is the Makefile's test; the other line needs a model of the reader's.
    if "monoblock " in line and "my-model" not in line and "pip install" not in line
]


@pytest.mark.parametrize("line", COMMANDS)
def test_command_examples(line: str, tmp_path: Path) -> None:
    run(["bash", "-euo", "pipefail", "-c", line], tmp_path)


def test_examples_were_found() -> None:
    assert len(COMMANDS) > 5
    assert blocks(ROOT / "README.md", "python")
