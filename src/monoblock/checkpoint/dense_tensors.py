"""Weights in float8, dequantised to bfloat16 matrix by matrix.

A matrix `X` is `X.weight`, float8_e4m3fn (outputs, inputs), and its scales, which weights are multiplied by:
`X.weight_scale_inv` or `X.weight_scale`, one number; (outputs, 1); or one per block of outputs and inputs, (blocks of
outputs, blocks of inputs), where the last blocks may be smaller.

float8_e4m3fn (arXiv:2209.05433): sign, 4 bits of exponent with bias 7, 3 bits of mantissa; no infinities, and only
0x7f and 0xff are NaN.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from monoblock.checkpoint import casts
from monoblock.checkpoint.array_adapters import adapter
from monoblock.checkpoint.dense_config import DenseDeclaration
from monoblock.checkpoint.weights import Tensors
from monoblock.errors import CheckpointError, ShapeMismatch

log = logging.getLogger("monoblock")

Array = np.ndarray[Any, Any]
_CHUNK = 1 << 21  # weights that are dequantised at a time
_SCALES = (".weight_scale_inv", ".weight_scale")
# Scales of activations, which are not quantised here.
_MORE = (".input_scale", ".activation_scale", ".output_scale")


def _float8_values() -> Array:
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    # Exponent 0: subnormal numbers.
    magnitude = np.where(exponent > 0, 8 + mantissa, mantissa) * 2.0 ** (np.maximum(exponent, 1) - 10)
    magnitude[[0x7F, 0xFF]] = np.nan
    return np.where(bits < 128, magnitude, -magnitude).astype(np.float32)


FLOAT8 = _float8_values()  # the value of each byte


class Float8Tensors:
    """A store's tensors, with each float8 matrix as bfloat16.

    CheckpointError, ShapeMismatch: a matrix lacks its scales, or they do not fit the declaration.
    """

    def __init__(self, tensors: Tensors, how: DenseDeclaration, framework: str):
        self._tensors, self._how, self._arrays = tensors, how, adapter(framework)
        names = dict.fromkeys(tensors)
        self._scales: dict[str, str] = {}  # matrix -> its scales
        for name in names:
            if tensors.dtype(name).startswith("F8") and not name.endswith(_SCALES):
                self._scales[name] = self._checked(name, names)
        own = {f"{name.removesuffix('.weight')}{end}" for name in self._scales for end in (*_SCALES, *_MORE)}
        for name in names:
            if name.endswith(_SCALES) and name not in own:
                raise CheckpointError(
                    f"{tensors.path(name).name} has {name}, but no float8 matrix of that name: fetch it again"
                )
        self._names = [name for name in names if name not in own]
        first = next(iter(self._scales))
        log.warning(
            "%s: %d matrices in float8 (%s, ...) are dequantised to bfloat16",
            tensors.path(first),
            len(self._scales),
            first,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(name)

    def dtype(self, name: str) -> str:
        return "BF16" if name in self._scales else self._tensors.dtype(name)

    def path(self, name: str) -> Path:
        return self._tensors.path(name)

    def tensor(self, name: str) -> Any:
        if name not in self._scales:
            return self._tensors.tensor(name)
        made = self._dequantised(name)
        return self._arrays.from_buffer(made, "BF16", made.shape)

    def _checked(self, name: str, names: dict[str, None]) -> str:
        """The name of a matrix's scales."""
        tensors, how = self._tensors, self._how
        where, kind, shape = tensors.path(name).name, tensors.dtype(name), tensors.shape(name)
        if kind != "F8_E4M3" or len(shape) != 2 or 0 in shape or not name.endswith(".weight"):
            raise CheckpointError(
                f"{name} in {where} is {kind} {list(shape)}: of float8 tensors, only matrices of F8_E4M3 are read"
            )
        stem = name.removesuffix(".weight")
        ends = [end for end in _SCALES if stem + end in names]
        if len(ends) != 1:
            found = f"both {_SCALES[0]} and {_SCALES[1]}" if ends else f"no {stem}{_SCALES[0]}"
            raise CheckpointError(f"the checkpoint has {name} in float8, but {found}: fetch it again")
        scale = stem + ends[0]
        wanted = {
            "tensor": [(), (1,), (1, 1)],
            "channel": [(shape[0], 1), (shape[0],)],
            "block": [tuple(-(-n // size) for n, size in zip(shape, how.block or (1, 1), strict=True))],
        }[how.per]
        found = tensors.shape(scale)
        if found not in wanted or tensors.dtype(scale) not in ("F32", "BF16", "F16", "F8_E8M0"):
            raise ShapeMismatch(
                f"{scale} in {tensors.path(scale).name} is {tensors.dtype(scale)} {list(found)}, but a matrix of "
                f"{list(shape)} with a scale per {how.per} has F32 {list(wanted[0])}"
            )
        return scale

    def _dequantised(self, name: str) -> Array:
        (outputs, inputs), where = self._tensors.shape(name), self._tensors.path(name).name
        codes, scales = _bytes(self._tensors.tensor(name)), self._scale_values(name)
        height, width = self._how.block or (outputs if self._how.per == "tensor" else 1, inputs)
        made = np.empty((outputs, inputs), "<u2")
        step = max(1, _CHUNK // inputs)
        for first in range(0, outputs, step):
            rows = slice(first, min(first + step, outputs))
            weights = FLOAT8[codes[rows]]
            each = scales[np.arange(rows.start, rows.stop) // height]
            with np.errstate(over="ignore", invalid="ignore"):
                weights *= np.repeat(each, width, axis=1)[:, :inputs] if each.shape[1] > 1 else each
            if not np.isfinite(weights).all():
                raise CheckpointError(
                    f"{name} in {where} has weights that are not finite: the file is damaged"
                )
            made[rows] = casts.cast(weights, "BF16", name).view("<u2").reshape(weights.shape)
        return made

    def _scale_values(self, name: str) -> Array:
        """The scales of a matrix in float32, (blocks of outputs, blocks of inputs)."""
        scale = self._scales[name]
        tensor = self._tensors.tensor(scale)
        if self._tensors.dtype(scale) == "F8_E8M0":  # 2 ** (byte - 127)
            exponents = _bytes(tensor).astype(np.int32)
            values = np.where(exponents == 255, np.nan, np.ldexp(1.0, exponents - 127)).astype(np.float32)
        elif isinstance(tensor, np.ndarray):
            values = casts.widened(cast("Any", tensor)).astype(np.float32)
        else:
            values = tensor.float().numpy()
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{scale} in {self._tensors.path(scale).name} has scales that are not finite: the file is damaged"
            )
        return values.reshape(1, 1) if self._how.per == "tensor" else values.reshape(len(values), -1)


def _bytes(tensor: Any) -> Array:
    """The bytes of a framework's tensor of one-byte elements, in its shape."""
    if isinstance(tensor, np.ndarray):
        return np.ascontiguousarray(cast("Any", tensor)).view(np.uint8)
    import torch

    return tensor.contiguous().view(torch.uint8).numpy()
