"""Model outputs as nodes of PyTorch's trees (`torch.utils._pytree`), as `torch.export` and DDP need them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from torch.utils import _pytree as pytree

from monoblock.outputs import ModelOutput


def register_outputs() -> None:
    """Register all output classes, and those that are defined later."""
    if register in ModelOutput.on_subclass:
        return
    for kind in ModelOutput.subclasses:
        register(kind)
    ModelOutput.on_subclass.append(register)


def register(kind: type[ModelOutput]) -> None:
    """Make an output class a node whose children are its items; the names of these are its context."""
    pytree.register_pytree_node(
        kind,
        _flatten,
        functools.partial(_unflatten, kind),
        serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
        flatten_with_keys_fn=_flatten_with_keys,
    )


def _flatten(output: ModelOutput) -> tuple[list[Any], list[str]]:
    return list(output.values()), list(output)


def _flatten_with_keys(output: ModelOutput) -> tuple[list[tuple[Any, Any]], list[str]]:
    return [(pytree.MappingKey(name), value) for name, value in output.items()], list(output)


def _unflatten(kind: type[ModelOutput], values: Iterable[Any], names: Sequence[str]) -> ModelOutput:
    return kind(**dict(zip(names, values, strict=True)))
