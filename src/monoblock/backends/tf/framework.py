"""Import of TensorFlow and Keras: Keras with its TensorFlow backend, and neither PyTorch nor JAX.

Importing this module raises ImportError if Keras cannot use the backend `BACKEND`.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

BACKEND = "tensorflow"


def _without_jax() -> Any:
    """Import TensorFlow without JAX. TensorFlow's Lite converter imports JAX if it is installed, which takes a second
    and 100 MB; during the import, JAX appears to be absent."""
    if "tensorflow" in sys.modules or "jax" in sys.modules:
        return importlib.import_module("tensorflow")
    sys.modules["jax"] = None  # pyright: ignore[reportArgumentType]
    try:
        return importlib.import_module("tensorflow")
    finally:
        del sys.modules["jax"]


def _choose_backend() -> None:
    """Set Keras's backend before TensorFlow imports Keras; ImportError if another one is set."""
    if "keras" in sys.modules:
        return
    backend = os.environ.setdefault("KERAS_BACKEND", BACKEND)
    if backend != BACKEND:
        raise ImportError(_wrong(f"KERAS_BACKEND={backend!r}", f"set it to {BACKEND!r}, or unset it"))


def _check_backend() -> None:
    if (found := importlib.import_module("keras").backend.backend()) != BACKEND:
        what, instead = f"Keras runs on {found!r} in this process", "before Keras is imported"
        raise ImportError(_wrong(what, f"set KERAS_BACKEND={BACKEND} {instead}"))


def _wrong(what: str, instead: str) -> str:
    return f"monoblock's TF classes need Keras on TensorFlow, but {what}: {instead}"


_choose_backend()
_without_jax()
_check_backend()
