"""Weights that torchao quantised to integers, as transformers saves them, in this library's formats.

A matrix `X` is `X._weight_qdata`, int8 (outputs, inputs); `X._weight_scale` and `X._weight_zero_point` (outputs,
groups). The file's metadata has, under `X.weight`, the class of the tensor, the inputs of a group and the range of the
integers, as JSON. A weight is scale * (code - zero point).

Source: https://github.com/pytorch/ao (prototype/safetensors, quantization/quantize_/workflows).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from monoblock.checkpoint.affine_tensors import AffineTensors
from monoblock.checkpoint.packed import GROUPS, RUN, Array, PackedForm
from monoblock.checkpoint.quantized_view import as_array
from monoblock.checkpoint.torchao_config import member
from monoblock.checkpoint.weights import Tensors
from monoblock.errors import CheckpointError, ShapeMismatch, UnsupportedConfig
from monoblock.field_types import brief

_QDATA, _SCALE, _ZERO = "._weight_qdata", "._weight_scale", "._weight_zero_point"
_CLASSES = ("Int8Tensor", "IntxUnpackedToInt8Tensor")


@dataclass(frozen=True)
class _Matrix:
    """The bits of the integers and the inputs of a group."""

    bits: int
    group: int


class TorchaoTensors(AffineTensors):
    """A store's tensors, with torchao's matrices as codes, scale and, where zero points are not the middle code, low.
    `metadata`: of the files."""

    codes_end, endings = _QDATA, (_QDATA, _SCALE, _ZERO)

    def __init__(self, tensors: Tensors, metadata: Mapping[str, str], framework: str):
        self._metadata, self._matrices = metadata, dict[str, _Matrix]()
        super().__init__(tensors, framework)

    def stems(self) -> list[str]:
        return [name.removesuffix(_QDATA) for name in self.names if name.endswith(_QDATA)]

    def checked_shape(self, stem: str) -> tuple[int, int]:
        tensors, names = self.tensors, [stem + end for end in self.endings]
        where = tensors.path(names[0]).name
        if missing := next((name for name in names if name not in self.names), None):
            raise CheckpointError(f"the checkpoint has {names[0]}, but lacks {missing}: fetch it again")
        kind, shape = tensors.dtype(names[0]), tensors.shape(names[0])
        matrix = self._matrices[stem] = self._described(stem, where)
        scales, zeros = ((tensors.dtype(name), tensors.shape(name)) for name in names[1:])
        fits = kind == "I8" and len(shape) == 2 and 0 not in shape and shape[1] % matrix.group == 0
        if fits:
            groups = (shape[0], shape[1] // matrix.group)
            fits = (
                scales[1] == zeros[1] == groups and scales[0] in ("F16", "BF16", "F32") and zeros[0] == "I8"
            )
        if not fits:
            raise ShapeMismatch(
                f"{stem} in {where} has qdata {kind} {list(shape)}, scale {scales[0]} {list(scales[1])} and zero point "
                f"{zeros[0]} {list(zeros[1])}, which is not the layout of torchao with groups of {matrix.group} inputs"
            )
        return shape[0], shape[1]

    def _described(self, stem: str, where: str) -> _Matrix:
        """What the metadata say of a matrix."""
        name = f"{stem}.weight"
        try:
            found: Any = json.loads(self._metadata[name])
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{where} has quantised tensors of {stem}, but its metadata does not describe {name}: fetch it again"
            ) from error
        kind, data = member(found, "_type"), member(found, "_data")
        if kind not in _CLASSES:
            raise UnsupportedConfig(
                f"{name} in {where} is a {brief(kind)} of torchao, which is not read; {' and '.join(_CLASSES)} are: "
                "dequantise it with torchao, and save the result"
            )
        block: Any = member(data, "block_size")
        sizes: list[Any] = list(block) if isinstance(block, list) else []  # pyright: ignore
        if len(sizes) != 2 or sizes[0] != 1 or type(sizes[1]) is not int or sizes[1] < 1:
            raise UnsupportedConfig(
                f"{name} in {where} has the block_size {brief(block)}, which is not read: it must be "
                "[1, inputs of a group]"
            )
        target: Any = member(member(data, "target_dtype"), "_data") or "int8"
        bits = {f"int{bits}": bits for bits in range(1, 9)}.get(str(target))
        if bits is None:
            raise UnsupportedConfig(
                f"{name} in {where} has the target_dtype {brief(target)}, which is not read: expected int1 to int8"
            )
        return _Matrix(bits, sizes[1])

    def own_form(self, stem: str) -> PackedForm | None:
        matrix, inputs = self._matrices[stem], self.shapes[stem][1]
        whole = matrix.group == inputs or matrix.group % RUN == 0
        group = RUN if whole else matrix.group
        if group not in GROUPS:
            return None
        zeros, bits = self.zero_points(stem), 4 if matrix.bits <= 4 else 8
        low = bool((zeros != self._middle(stem)).any())
        held = low and bool(zeros.min() >= 0)
        short = self.tensors.dtype(stem + _SCALE) == "F16" and (held or not low)
        return PackedForm(bits=bits, group=group, low=low, scales="F16" if short else "F32", zero_points=held)

    def group(self, stem: str) -> int:
        return self._matrices[stem].group

    def _middle(self, stem: str) -> int:
        """The code of the integer 0."""
        return 8 if self._matrices[stem].bits <= 4 else 128

    def codes(self, stem: str, rows: slice) -> Array:
        stored = as_array(self.tensors.tensor(stem + _QDATA))[rows]
        limit = 1 << self._matrices[stem].bits - 1
        if limit < 128 and (stored.min() < -limit or stored.max() >= limit):
            raise CheckpointError(
                f"{stem}{_QDATA} in {self.tensors.path(stem + _QDATA).name} has integers that are none of "
                f"{self._matrices[stem].bits} bits: it is damaged"
            )
        return (stored.astype(np.int16) + self._middle(stem)).astype(np.uint8)

    def scales(self, stem: str) -> Array:
        values = np.asarray(as_array(self.tensors.tensor(stem + _SCALE)), np.float32)
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{stem}{_SCALE} in {self.tensors.path(stem + _SCALE).name} has scales that are not finite"
            )
        return values

    def lows(self, stem: str) -> Array:
        return self.scales(stem) * -self.zero_points(stem).astype(np.float32)

    def zero_points(self, stem: str) -> Array:
        """The codes of 0; those of 4 bits may be negative, where no form with zero points holds them."""
        return as_array(self.tensors.tensor(stem + _ZERO)).astype(np.int16) + self._middle(stem)
