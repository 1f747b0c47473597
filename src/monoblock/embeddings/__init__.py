"""Sentence embeddings, with the interface of the package sentence-transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monoblock.embeddings.cross_encoder import CrossEncoder
    from monoblock.embeddings.model import SentenceTransformer
    from monoblock.embeddings.modules import Dense, LayerNorm, Normalize, Pooling
    from monoblock.embeddings.quantization import quantize_embeddings
    from monoblock.embeddings.transformer import Transformer

_HOME = {
    "CrossEncoder": "cross_encoder",
    "Dense": "modules",
    "LayerNorm": "modules",
    "Normalize": "modules",
    "Pooling": "modules",
    "SentenceTransformer": "model",
    "Transformer": "transformer",
    "quantize_embeddings": "quantization",
}

__all__ = [
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
