"""Vectors of texts on TensorFlow, compared with those that sentence-transformers gave."""

from __future__ import annotations

from pathlib import Path

import embedding_checks as checks
import pytest
import tensorflow as tf


@pytest.mark.parametrize("family", checks.cases.FAMILIES)
def test_families(tmp_path: Path, family: str) -> None:
    checks.check_family(tmp_path, family, "tf")


def test_modules(tmp_path: Path) -> None:
    checks.check_modules(tmp_path, "tf")


def test_outputs(tmp_path: Path) -> None:
    checks.check_outputs(tmp_path, "tf", tf.Tensor)


def test_scores(tmp_path: Path) -> None:
    checks.check_scores(tmp_path, "tf")
