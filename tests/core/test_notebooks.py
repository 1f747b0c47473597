"""The notebooks in examples/: their code, their stored outputs, and, for `make test-notebooks`, that they run."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
PICTURE = 60_000  # bytes of a picture
executes = pytest.mark.skipif(
    not os.environ.get("MONOBLOCK_TEST_NOTEBOOKS"), reason="run by `make test-notebooks`"
)
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str = "code") -> list[dict[str, Any]]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in found if cell["cell_type"] == kind]


def test_there_are_four() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "chat_and_attention",
        "embeddings_and_search",
        "jax_and_keras",
        "lora_on_your_text",
    ]


@each
def test_the_code_compiles_and_imports_names_that_exist(path: Path) -> None:
    tree = ast.parse("\n".join(cell["source"] for cell in cells(path)))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("monoblock"):
            module = importlib.import_module(node.module or "")
            names = {*dir(module), *getattr(module, "_NAMES", ()), *getattr(module, "_PACKAGES", ())}
            for alias in node.names:
                if alias.name not in names:
                    importlib.import_module(f"{node.module}.{alias.name}")


@each
def test_the_outputs_are_stored_in_order_and_small(path: Path) -> None:
    code = cells(path)
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)], (
        "run tools/run_notebooks.py"
    )
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert kinds & {"image/png", "image/svg+xml", "text/html"}, "a notebook has a picture"
    for output in outputs:
        for kind, content in output.get("data", {}).items():
            size = len("".join(content)) * (3 / 4 if kind == "image/png" else 1)
            assert size <= PICTURE, (kind, size)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(home|tmp|root|Users|work)/", text), "a path of one machine"
    for link in re.findall(r"\]\(([^)#\s]+)", "\n".join(cell["source"] for cell in cells(path, "markdown"))):
        assert (path.parent / link).exists(), link


@executes
@each
def test_it_runs(path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "run_notebooks.py"), path.stem]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
