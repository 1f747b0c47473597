"""The examples of docs/tensorflow.md and docs/tflite.md, run in order on the embedded model."""

from __future__ import annotations

from pathlib import Path

from documents import DOCS, run_python


def test_examples(tmp_path: Path) -> None:
    run_python(tmp_path, DOCS / "tensorflow.md", DOCS / "tflite.md")
