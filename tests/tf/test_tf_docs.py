"""The examples of the pages of TensorFlow run on the embedded model, in their order."""

from __future__ import annotations

from pathlib import Path

from documents import DOCS, run_python


def test_examples(tmp_path: Path) -> None:
    run_python(tmp_path, DOCS / "tensorflow.md", DOCS / "tflite.md")
