"""The code blocks of README and docs: extraction, and execution in a new process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import xla_test_flags

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: Path, language: str) -> list[str]:
    """The code blocks of a document in one language, in order."""
    found = BLOCK.findall(document.read_text(encoding="utf-8"))
    return [code for kind, code in found if kind == language]


def run(command: list[str], folder: Path) -> None:
    """Runs a command in a folder, offline; it must succeed."""
    # `python` and `monoblock` are those of this environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"} | xla_test_flags.environment()
    result = subprocess.run(
        command, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr


def run_python(folder: Path, *documents: Path) -> None:
    """Runs the Python blocks of the documents one after the other in one process.

    Without garbage collection, which takes an eighth of the time in which TensorFlow traces graphs.
    """
    code = ["import gc; gc.disable()", *(code for page in documents for code in blocks(page, "python"))]
    run([sys.executable, "-c", "\n".join(code)], folder)
