"""How a model makes the tokens after a prompt, in words: the fast path that it takes, or why it takes none."""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from monoblock.backends.pytorch.generation import cuda_graphs, native_decoder

log = logging.getLogger("monoblock")

NATIVE, GRAPH = "native step", "CUDA graph"

# What was said of each model: not part of the model, so neither copied nor saved.
_said: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def decoding_path(model: Any) -> str:
    """The fast path of this model, or what stands in its way."""
    if not model.can_generate():
        return f"{type(model).__name__} predicts no next token"
    if model.device.type in cuda_graphs.CAPTURE:
        return cuda_graphs.obstacle(model) or GRAPH
    return native_decoder.obstacle(model) or NATIVE


def report(model: Any, path: str) -> None:
    """Log how a call decodes, once for each model and path."""
    said = _said.setdefault(model, set())
    if path in said:
        return
    said.add(path)
    if path in (NATIVE, GRAPH):
        log.info("%s: decoding by the %s", model.row.name, path)
    else:
        log.info("%s: decoding module by module, because of: %s", model.row.name, path)
