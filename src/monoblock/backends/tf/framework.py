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


def _keras() -> Any:
    asked = os.environ.get("KERAS_BACKEND")
    if "keras" not in sys.modules and asked is None:
        os.environ["KERAS_BACKEND"] = BACKEND
    elif "keras" not in sys.modules and asked != BACKEND:
        raise ImportError(_wrong(f"KERAS_BACKEND={asked!r}", f"set it to {BACKEND!r}, or unset it"))
    keras = importlib.import_module("keras")
    if (found := keras.backend.backend()) != BACKEND:
        raise ImportError(
            _wrong(
                f"Keras runs on {found!r} in this process",
                f"set KERAS_BACKEND={BACKEND} before Keras is imported",
            )
        )
    return keras


def _wrong(what: str, instead: str) -> str:
    return f"monoblock's TF classes need Keras on TensorFlow, but {what}: {instead}"


_without_jax()
_keras()
