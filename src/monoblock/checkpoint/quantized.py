"""Quantised weights in checkpoint files: a matrix `X.weight` is stored as `X.weight.codes`, with `X.weight.scale` for 8
and 4 bits and `X.weight.low` (the groups' minima, or zero points) for 4 bits.

Each component is presented under the name of its matrix, so that the families' key maps apply unchanged. Rows are
always outputs: a quantised matrix is never stored transposed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from monoblock.checkpoint.keymap import KeyMap, KeyRow, Op, Same, Transposed
from monoblock.checkpoint.weights import RenamedTensors, Tensors
from monoblock.errors import CheckpointError

COMPONENTS = ("codes", "scale", "low")
# Endings of other tools' names.
_FOREIGN = (".qweight", ".weight_packed", ".weight_scale", ".SCB", "._weight_qdata")
_ENDINGS = tuple(f".weight.{component}" for component in COMPONENTS)


def component(tensors: Tensors, name: str) -> RenamedTensors:
    """The tensors of one component ("codes", "scale", "low"), by the names of their matrices."""
    ending = f".weight.{name}"
    return RenamedTensors(
        tensors, {key.removesuffix(f".{name}"): key for key in tensors if key.endswith(ending)}
    )


def plain(tensors: Tensors) -> Tensors:
    """All tensors that are no component of a quantised matrix."""
    if not is_quantized(tensors):
        return tensors
    return RenamedTensors(tensors, {key: key for key in tensors if not key.endswith(_ENDINGS)})


def is_quantized(names: Iterable[str]) -> bool:
    """Whether any of these names is a component of a quantised matrix."""
    return any(name.endswith(_ENDINGS) for name in names)


def refuse(tensors: Tensors) -> None:
    """CheckpointError if there are quantised matrices, for readers that do not support them."""
    for name in tensors:
        dense = name.endswith((".weight_scale_inv", ".weight.absmax")) or tensors.dtype(name).startswith("F8")
        mlx = name.endswith(".weight") and tensors.dtype(name) == "U32"
        if (
            dense
            or mlx
            or name.endswith(
                (*_ENDINGS, ".qweight", ".weight_packed", ".weight_scale", ".SCB", "._weight_qdata")
            )
        ):
            then = "" if dense else "call dequantize(), "
            raise CheckpointError(
                f"{tensors.path(name).name} holds quantised weights ({name}), which only the PyTorch classes read: "
                f"load the folder with one of them, {then}and save the result"
            )


def by_rows(keymap: KeyMap) -> KeyMap:
    """The key map for quantised matrices: as `keymap`, without transposes."""
    heads = {kind: _by_rows(rows) for kind, rows in keymap.heads.items()}
    return replace(keymap, rows=_by_rows(keymap.rows), heads=heads)


def _by_rows(rows: Iterable[KeyRow]) -> tuple[KeyRow, ...]:
    return tuple(
        replace(row, spellings=tuple(replace(s, op=_row_op(s.op)) for s in row.spellings)) for row in rows
    )


def _row_op(op: Op) -> Op:
    return Same() if isinstance(op, Transposed) else op


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A state dict as its plain tensors, and its quantised matrices as component -> matrix -> tensor."""
    found: dict[str, dict[str, Any]] = {name: {} for name in COMPONENTS}
    rest: dict[str, Any] = {}
    for key, tensor in state.items():
        matrix, _, kind = key.rpartition(".")
        if key.endswith(_ENDINGS):
            found[kind][matrix] = tensor
        else:
            rest[key] = tensor
    return rest, found
