"""Vectors of texts on JAX, compared with those that sentence-transformers gave."""

from __future__ import annotations

from pathlib import Path

import embedding_checks as checks
import jax
import pytest


@pytest.mark.parametrize("family", checks.cases.FAMILIES)
def test_families(tmp_path: Path, family: str) -> None:
    checks.check_family(tmp_path, family, "flax")


def test_modules(tmp_path: Path) -> None:
    checks.check_modules(tmp_path, "flax")


def test_outputs(tmp_path: Path) -> None:
    checks.check_outputs(tmp_path, "flax", jax.Array)


def test_scores(tmp_path: Path) -> None:
    checks.check_scores(tmp_path, "flax")
