"""Sentence embeddings, with the interface of the package sentence-transformers."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "SentenceTransformer": "model",
    "CrossEncoder": "cross_encoder",
    "Transformer": "transformer",
    "Pooling": "modules",
    "Dense": "modules",
    "LayerNorm": "modules",
    "Normalize": "modules",
    "quantize_embeddings": "quantization",
}

__all__ = [  # noqa: PLE0604
    "CrossEncoder",
    "Dense",
    "LayerNorm",
    "Normalize",
    "Pooling",
    "SentenceTransformer",
    "Transformer",
    "quantize_embeddings",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
