"""Packed weights in a checkpoint's files: where the hub has a matrix `X.weight`, there are `X.weight.codes`,
for 8 and 4 bits `X.weight.scale` and for 4 bits `X.weight.low`, of its rows.

So that the families' key maps hold for them as they are, a matrix's tensors of one kind are looked at by the name
of the matrix. All are rows of outputs: what a map stores transposed is not, when it is packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from monoblock.checkpoint.keymap import KeyMap, KeyRow, Op, Same, Transposed
from monoblock.checkpoint.weights import RenamedTensors, Tensors
from monoblock.errors import CheckpointError

COMPONENTS = ("codes", "scale", "low")
_ENDINGS = tuple(f".weight.{component}" for component in COMPONENTS)


def component(tensors: Tensors, name: str) -> RenamedTensors:
    """The tensors of one kind ("codes", "scale", "low"), by the names of their matrices."""
    ending = f".weight.{name}"
    return RenamedTensors(
        tensors, {key.removesuffix(f".{name}"): key for key in tensors if key.endswith(ending)}
    )


def plain(tensors: Tensors) -> Tensors:
    """All other tensors."""
    if not is_quantized(tensors):
        return tensors
    return RenamedTensors(tensors, {key: key for key in tensors if not key.endswith(_ENDINGS)})


def is_quantized(names: Iterable[str]) -> bool:
    """Whether any of these tensors is component of a packed matrix."""
    return any(name.endswith(_ENDINGS) for name in names)


def refuse(tensors: Tensors) -> None:
    """CheckpointError if there are packed matrices, for what reads plain ones only."""
    if (found := next((name for name in tensors if name.endswith(_ENDINGS)), None)) is not None:
        raise CheckpointError(
            f"{tensors.path(found).name} holds packed weights ({found}), which only the PyTorch classes read: load the "
            "folder with one of those, call its dequantize(), and save that"
        )


def by_rows(keymap: KeyMap) -> KeyMap:
    """The map of packed matrices' rows, of the map of the matrices."""
    heads = {kind: _by_rows(rows) for kind, rows in keymap.heads.items()}
    return replace(keymap, rows=_by_rows(keymap.rows), heads=heads)


def _by_rows(rows: Iterable[KeyRow]) -> tuple[KeyRow, ...]:
    return tuple(
        replace(row, spellings=tuple(replace(s, op=_row_op(s.op)) for s in row.spellings)) for row in rows
    )


def _row_op(op: Op) -> Op:
    return Same() if isinstance(op, Transposed) else op


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A state dict by the hub's names: its plain tensors, and those of packed matrices, kind -> matrix -> tensor."""
    parts: dict[str, dict[str, Any]] = {name: {} for name in COMPONENTS}
    rest: dict[str, Any] = {}
    for key, tensor in state.items():
        matrix, _, kind = key.rpartition(".")
        if key.endswith(_ENDINGS):
            parts[kind][matrix] = tensor
        else:
            rest[key] = tensor
    return rest, parts
