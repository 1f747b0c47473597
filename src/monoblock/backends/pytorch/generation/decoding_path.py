"""The fast path by which a model decodes (native step or CUDA graph), or the reason why it has none, as text."""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from monoblock.backends.pytorch.generation import cuda_graphs, native_decoder

log = logging.getLogger("monoblock")

NATIVE, GRAPH = "native step", "CUDA graph"

# The paths logged for each model: outside the model, so that they are neither copied nor saved.
_logged: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def decoding_path(model: Any) -> str:
    """The fast path of this model, or the obstacle to it."""
    if not model.can_generate():
        return f"{type(model).__name__} predicts no next token"
    if model.device.type in cuda_graphs.CAPTURE:
        return cuda_graphs.obstacle(model) or GRAPH
    return native_decoder.obstacle(model) or NATIVE


def report(model: Any, path: str) -> None:
    """Log the path by which a call decodes, once per model and path."""
    logged = _logged.setdefault(model, set())
    if path in logged:
        return
    logged.add(path)
    if path in (NATIVE, GRAPH):
        log.info("%s: decoding by the %s", model.row.name, path)
    else:
        log.info("%s: decoding module by module, because of: %s", model.row.name, path)
