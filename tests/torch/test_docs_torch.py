"""Every Python and shell example of README and docs, run on the embedded model in document order."""

from __future__ import annotations

from pathlib import Path

import pytest
from documents import DOCS, ROOT, blocks, run, run_python

# docs/demo.md quotes what the model writes, which is not always Python. The examples of the others name checkpoints
# that are not here: tests of their own run them on tiny ones (test_convert_docs.py, test_visualizer.py). The page of
# TensorFlow has its test in tests/tf, that of serving in tests/serving, that of fine-tuning in test_training.py,
# that of exports, which needs optimum, in tests/ecosystem/test_export_files.py.
ELSEWHERE = {
    "demo.md",
    "convert.md",
    "formats.md",
    "export.md",
    "attention.md",
    "tensorflow.md",
    "tflite.md",
    "serving.md",
    "training.md",
}
DOCUMENTS = [ROOT / "README.md", *sorted(path for path in DOCS.glob("*.md") if path.name not in ELSEWHERE)]


@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if blocks(d, "python")], ids=lambda path: path.name
)
def test_python_examples(document: Path, tmp_path: Path) -> None:
    run_python(tmp_path, document)


COMMANDS = [
    pytest.param(line, id=f"{document.name}: {line}")
    for document in DOCUMENTS
    for line in "\n".join(blocks(document, "sh")).replace("\n  ", " ").splitlines()
    # An indented line continues the one before it. Installation is the Makefile's test; other lines need a model.
    if "monoblock " in line and "my-model" not in line and "pip install" not in line
]


@pytest.mark.parametrize("line", COMMANDS)
def test_command_examples(line: str, tmp_path: Path) -> None:
    run(["bash", "-euo", "pipefail", "-c", line], tmp_path)


def test_examples_were_found() -> None:
    assert len(COMMANDS) > 5
    assert blocks(ROOT / "README.md", "python")
