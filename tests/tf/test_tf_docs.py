"""The examples of the pages of TensorFlow run on the embedded model, in their order."""

from __future__ import annotations

from pathlib import Path

import pytest
from documents import DOCS, run_python


@pytest.mark.parametrize("page", ["tensorflow.md", "tflite.md"])
def test_examples(page: str, tmp_path: Path) -> None:
    run_python(DOCS / page, tmp_path)
