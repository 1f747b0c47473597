"""TensorFlow and Keras, imported in the right way: Keras on its TensorFlow backend, and neither PyTorch nor JAX.

`BACKEND` is what Keras runs on; importing this module raises an ImportError that says why it cannot be TensorFlow.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

BACKEND = "tensorflow"


def _without_jax() -> Any:
    """TensorFlow. Its Lite converter imports JAX wherever JAX is installed, a second and a hundred megabytes that
    nothing here uses; to that import, JAX looks absent for as long as it takes."""
    if "tensorflow" in sys.modules or "jax" in sys.modules:
        return importlib.import_module("tensorflow")
    sys.modules["jax"] = None  # pyright: ignore[reportArgumentType]
    try:
        return importlib.import_module("tensorflow")
    finally:
        del sys.modules["jax"]


def _choose_backend() -> None:
    """Tell Keras, before TensorFlow imports it, to run on TensorFlow; ImportError if it is told otherwise."""
    if "keras" in sys.modules:
        return
    asked = os.environ.setdefault("KERAS_BACKEND", BACKEND)
    if asked != BACKEND:
        raise ImportError(_wrong(f"KERAS_BACKEND={asked!r}", f"set it to {BACKEND!r}, or unset it"))


def _check_backend() -> None:
    if (found := importlib.import_module("keras").backend.backend()) != BACKEND:
        what, instead = f"Keras runs on {found!r} in this process", "before Keras is imported"
        raise ImportError(_wrong(what, f"set KERAS_BACKEND={BACKEND} {instead}"))


def _wrong(what: str, instead: str) -> str:
    return f"monoblock's TF classes need Keras on TensorFlow, but {what}: {instead}"


_choose_backend()
_without_jax()
_check_backend()
