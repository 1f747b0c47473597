"""Weights that bitsandbytes stored in 4 bits, dequantised to bfloat16 matrix by matrix.

A matrix `X.weight` is stored as bytes of two codes each, the first in the high bits, row by row without padding. Beside
it are

    .quant_map          F32 (16,): the value of each code
    .absmax             F32 (blocks,): what the values of each block of consecutive weights are multiplied by; with
                        double quantisation U8 (blocks,), codes of .nested_quant_map
    .nested_quant_map   F32 (256,), and .nested_absmax, F32 (nested blocks,): the same for absmax, less nested_offset
    .quant_state.bitsandbytes__nf4 (or fp4)
                        JSON as U8: quant_type, blocksize, shape, dtype, nested_blocksize, nested_dtype, nested_offset

Source: https://github.com/bitsandbytes-foundation/bitsandbytes (QuantState.as_dict) and arXiv:2305.14314.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from monoblock.checkpoint import casts
from monoblock.checkpoint.array_adapters import adapter
from monoblock.checkpoint.header import ITEM_BYTES
from monoblock.checkpoint.weights import Tensors
from monoblock.errors import CheckpointError, ShapeMismatch
from monoblock.field_types import brief

log = logging.getLogger("monoblock")

Array = np.ndarray[Any, Any]
STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *(STATE + kind for kind in _KINDS))
_BLOCKS = tuple(1 << n for n in range(5, 13))  # 32 to 4096
_MAX_STATE = 4096  # bytes of JSON
_CHUNK = 1 << 20  # bytes of codes that are dequantised at a time


@dataclass(frozen=True, kw_only=True)
class _FourBitLayout:
    """The checked layout of a matrix; `nested`: weights' blocks that share a scale of scales, and the offset."""

    shape: tuple[int, int]
    block: int
    nested: tuple[int, float] | None


class FourBitTensors:
    """A store's tensors, with each 4-bit matrix as bfloat16.

    CheckpointError, ShapeMismatch: a matrix lacks a tensor, or they do not fit each other.
    """

    def __init__(self, tensors: Tensors, framework: str):
        self._tensors, self._arrays = tensors, adapter(framework)
        self._all = names = dict.fromkeys(tensors)
        stems = {name.partition(STATE)[0]: None for name in names if STATE in name}
        stems |= {name.removesuffix(end): None for end in _PARTS for name in names if name.endswith(end)}
        self._states = {stem: self._state(stem) for stem in stems}
        own = {stem + end for stem in stems for end in _PARTS}
        self._names = [name for name in names if name not in own]
        self.noted = False  # whether a warning says that matrices are dequantised, or none is due

    @property
    def four_bit(self) -> Collection[str]:
        """The names of the matrices in 4 bits."""
        return self._states.keys()

    def parts(self, name: str) -> dict[str, Any]:
        """A 4-bit matrix as it is stored: the framework's tensors `codes`, `values`, `absmax`, `nested_values` and
        `nested_absmax` (None without double quantisation), and the numbers of its form and its `kind`."""
        state, tensor = self._states[name], self._tensors.tensor
        nested = state.nested is not None
        return {
            "codes": self._flat_codes(name),
            "values": tensor(name + ".quant_map"),
            "absmax": tensor(name + ".absmax"),
            "nested_values": tensor(name + ".nested_quant_map") if nested else None,
            "nested_absmax": tensor(name + ".nested_absmax") if nested else None,
            "rows": state.shape[0],
            "columns": state.shape[1],
            "block": state.block,
            "nested_block": state.nested[0] if state.nested is not None else 0,
            "offset": float(np.float32(state.nested[1])) if state.nested is not None else 0.0,
            "kind": next(kind for kind in _KINDS if name + STATE + kind in self._all),
        }

    def _flat_codes(self, name: str) -> Any:
        codes = _bytes(self._tensors.tensor(name))
        return self._arrays.from_buffer(codes, "U8", codes.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._states[name].shape if name in self._states else self._tensors.shape(name)

    def dtype(self, name: str) -> str:
        return "BF16" if name in self._states else self._tensors.dtype(name)

    def path(self, name: str) -> Path:
        return self._tensors.path(name)

    def tensor(self, name: str) -> Any:
        if name not in self._states:
            return self._tensors.tensor(name)
        if not self.noted:
            self.noted = True
            log.warning(
                "%s: %d matrices in 4 bits of bitsandbytes (%s, ...) are dequantised to bfloat16",
                self._tensors.path(name),
                len(self._states),
                name,
            )
        made = self._dequantised(name)
        return self._arrays.from_buffer(made, "BF16", made.shape)

    def _state(self, name: str) -> _FourBitLayout:
        tensors = self._tensors
        states = [name + STATE + kind for kind in _KINDS if name + STATE + kind in self._all]
        if len(states) != 1:
            found = "several states" if states else f"no {name}{STATE}nf4 or fp4"
            raise CheckpointError(f"the checkpoint has {name} in 4 bits, but {found}: fetch it again")
        for end in ("", ".absmax", ".quant_map"):
            if name + end not in self._all:
                raise CheckpointError(
                    f"the checkpoint has {states[0]}, but lacks {name}{end}: fetch it again"
                )
        fields = self._fields(states[0])
        shape, block = fields.get("shape"), fields.get("blocksize")
        sizes = cast("list[Any]", shape) if isinstance(shape, list) else []
        proper = len(sizes) == 2 and all(type(size) is int and 0 < size < 1 << 31 for size in sizes)
        kind = states[0].rpartition("__")[2]
        if not proper or block not in _BLOCKS or type(block) is not int or fields.get("quant_type") != kind:
            raise self._damaged(
                states[0], f"shape={brief(shape)}, blocksize={brief(block)} are no proper state"
            )
        count = sizes[0] * sizes[1]
        blocks = -(-count // block)
        stored = math.prod(tensors.shape(name)) * ITEM_BYTES[tensors.dtype(name)]
        if stored != -(-count // 2):
            raise ShapeMismatch(
                f"{name} in {tensors.path(name).name} has {stored} bytes, but {sizes[0]} x {sizes[1]} weights in 4 "
                f"bits have {-(-count // 2)}"
            )
        self._expect(name + ".quant_map", "F32", (16,))
        nested = None
        if "nested_blocksize" in fields or name + ".nested_absmax" in self._all:
            size, offset = fields.get("nested_blocksize"), fields.get("nested_offset")
            if type(size) is not int or not 0 < size <= 1 << 20 or type(offset) not in (int, float):
                raise self._damaged(
                    states[0], f"nested_blocksize={brief(size)}, nested_offset={brief(offset)}"
                )
            if not abs(cast("float", offset)) < 1e30:  # NaN, too
                raise self._damaged(states[0], f"nested_offset={brief(offset)} is not finite")
            nested = size, float(cast("float", offset))
            self._expect(name + ".nested_quant_map", "F32", (256,))
            self._expect(name + ".nested_absmax", "F32", (-(-blocks // size),))
        self._expect(name + ".absmax", "F32" if nested is None else "U8", (blocks,))
        return _FourBitLayout(shape=(sizes[0], sizes[1]), block=block, nested=nested)

    def _fields(self, name: str) -> dict[str, Any]:
        """The JSON object of a state."""
        shape = self._tensors.shape(name)
        if self._tensors.dtype(name) != "U8" or len(shape) != 1 or shape[0] > _MAX_STATE:
            raise self._damaged(name, f"it is {self._tensors.dtype(name)} {list(shape)}, no short JSON text")
        try:
            found: Any = json.loads(_bytes(self._tensors.tensor(name)).tobytes())
        except (ValueError, RecursionError) as error:
            raise self._damaged(name, "it is no JSON") from error
        if not isinstance(found, dict):
            raise self._damaged(name, "it is no JSON object")
        return cast("dict[str, Any]", found)

    def _expect(self, name: str, kind: str, shape: tuple[int, ...]) -> None:
        if name not in self._all:
            raise CheckpointError(
                f"the checkpoint lacks {name}, which its 4-bit weights need: fetch it again"
            )
        found = self._tensors.dtype(name), self._tensors.shape(name)
        if found != (kind, shape):
            raise ShapeMismatch(
                f"{name} in {self._tensors.path(name).name} is {found[0]} {list(found[1])}, but the matrix needs "
                f"{kind} {list(shape)}"
            )

    def _damaged(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(f"{name} in {self._tensors.path(name).name} is damaged: {why}")

    def _values(self, name: str) -> Array:
        """A float32 tensor's values, which must be finite."""
        values = _bytes(self._tensors.tensor(name)).view("<f4")
        if not np.isfinite(values).all():
            raise self._damaged(name, "it has values that are not finite")
        return values

    def _dequantised(self, name: str) -> Array:
        state, codes = self._states[name], _bytes(self._tensors.tensor(name))
        values, scales = self._values(name + ".quant_map"), self._scales(name)
        pairs = np.empty((256, 2), np.float32)  # the two values of each byte
        pairs[:, 0], pairs[:, 1] = np.repeat(values, 16), np.tile(values, 16)
        count = state.shape[0] * state.shape[1]
        made = np.empty(count, "<u2")
        for first in range(0, len(codes), _CHUNK):  # a multiple of all block sizes
            weights = pairs[codes[first : first + _CHUNK]].reshape(-1)[: count - 2 * first]
            blocks = scales[2 * first // state.block :][: -(-len(weights) // state.block)]
            with np.errstate(over="ignore", invalid="ignore"):
                weights = weights * np.repeat(blocks, state.block)[: len(weights)]
            if not np.isfinite(weights).all():
                raise self._damaged(name, "it has weights that are not finite")
            made[2 * first : 2 * first + len(weights)] = casts.cast(weights, "BF16", name).view("<u2")
        return made.reshape(state.shape)

    def _scales(self, name: str) -> Array:
        """The scale of each block."""
        state = self._states[name]
        if state.nested is None:
            return self._values(name + ".absmax")
        size, offset = state.nested
        codes = _bytes(self._tensors.tensor(name + ".absmax"))
        table, outer = self._values(name + ".nested_quant_map"), self._values(name + ".nested_absmax")
        with np.errstate(over="ignore"):
            return table[codes] * np.repeat(outer, size)[: len(codes)] + np.float32(offset)


def _bytes(tensor: Any) -> Array:
    """The bytes of a framework's tensor, (bytes,)."""
    if isinstance(tensor, np.ndarray):
        return np.ascontiguousarray(cast("Any", tensor)).reshape(-1).view(np.uint8)
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
