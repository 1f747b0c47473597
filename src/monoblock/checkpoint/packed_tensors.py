"""Weights that GPTQ, AWQ, compressed-tensors or bitsandbytes (8 bits) quantised, in this library's formats.

A matrix `X` is stored as `X.qweight`, codes in 32-bit words; `X.qzeros`, zero points in words; `X.scales` (groups,
outputs); and in GPTQ `X.g_idx`, the group of each input. A weight is scale * (code - zero).

    GPTQ        qweight (inputs * bits / 32, outputs): a word has consecutive inputs, the first in its lowest bits;
                qzeros (groups, outputs * bits / 32): consecutive outputs; in the first format, zero - 1 is stored
    AWQ (gemm)  qweight (inputs, outputs / 8): the outputs 0, 2, 4, 6, 1, 3, 5, 7 of each eight from the lowest bits on;
                qzeros (groups, outputs / 8): likewise

compressed-tensors has other names: `X.weight_packed` (outputs, inputs * bits / 32), words of consecutive inputs, or
`X.weight`, int8 (outputs, inputs); `X.weight_scale` (outputs, groups), or one number; `X.weight_zero_point`, words of
consecutive outputs (outputs * bits / 32, groups), or int8 (outputs, groups); `X.weight_g_idx`. Codes in words are
2 ** (bits - 1) more than the signed integers.

bitsandbytes (8 bits): `X.weight`, int8 (outputs, inputs); `X.SCB` (outputs,), 127 times the scales; `X.weight_format`,
0 for this layout.

Sources: https://github.com/AutoGPTQ/AutoGPTQ (qlinear), https://github.com/casper-hansen/AutoAWQ (WQLinear_GEMM) and
https://github.com/vllm-project/compressed-tensors (compressors).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np

from monoblock.checkpoint import casts
from monoblock.checkpoint.bnb_tensors import STATE
from monoblock.checkpoint.mlx_config import MLX
from monoblock.checkpoint.mlx_tensors import is_mlx
from monoblock.checkpoint.packed import (
    GROUPS,
    RUN,
    Array,
    PackedForm,
    common_form,
    fused_members,
    pack_codes,
    pack_groups,
)
from monoblock.checkpoint.packed_config import BITSANDBYTES, COMPRESSED, PackedDeclaration
from monoblock.checkpoint.quantized_view import QuantizedView, as_array
from monoblock.checkpoint.torchao_config import TORCHAO
from monoblock.checkpoint.weights import Tensors
from monoblock.errors import CheckpointError, ShapeMismatch

log = logging.getLogger("monoblock")

# The endings of the names of codes, zero points, scales and groups of inputs.
_ENDINGS = {
    "qweight": (".qweight", ".qzeros", ".scales", ".g_idx"),
    "words": (".weight_packed", ".weight_zero_point", ".weight_scale", ".weight_g_idx"),
    "int8": (".weight", ".weight_zero_point", ".weight_scale", ".weight_g_idx"),
    "scb": (".weight", ".weight_zero_point", ".SCB", ".weight_g_idx"),
}
_SIGNED = ("int8", "scb")
# Further tensors of compressed-tensors' modules: the shape, which is implied, and scales of activations.
_MORE = (
    ".weight_shape",
    ".weight_format",
    ".input_scale",
    ".input_zero_point",
    ".output_scale",
    ".output_zero_point",
)
_AWQ_ORDER = np.array((0, 4, 1, 5, 2, 6, 3, 7))  # where the outputs of a word are
_CHUNK = 1 << 21  # weights that are unpacked at a time


class PackedTensors(QuantizedView):
    """A store's tensors, with each quantised matrix as codes, scale and low, or dequantised to bfloat16.

    `biases`: whether the model's matrices have biases; if not, biases of zeros, which some tools write, are left out.
    """

    def __init__(self, tensors: Tensors, how: PackedDeclaration, framework: str, *, biases: bool):
        super().__init__(tensors, framework)
        self._how = how
        self._all = names = dict.fromkeys(tensors)
        self.codes_end, self._zeros_end, self._scales_end, self._index_end = ends = _ENDINGS[how.layout]
        stems = [name.removesuffix(ends[0]) for name in names if name.endswith(ends[0])]
        if how.layout in _SIGNED:
            stems = [stem for stem in stems if stem + ends[2] in names]
        self.shapes = {stem: self._checked_shape(stem) for stem in stems}
        forms = {stem: self._form(stem) for stem in stems}
        for stem in stems:
            here = [
                member for member in fused_members(stem) if member in forms or f"{member}.weight" in names
            ]
            held = [form for member in here if (form := forms.get(member)) is not None]
            # None if one of them is not packed, or not quantised.
            common = common_form(held) if len(held) == len(here) else None
            forms |= dict.fromkeys((member for member in here if member in forms), common)
        more = _MORE if how.layout != "qweight" else ()
        own = {f"{stem}{end}" for stem in stems for end in (*ends, *more)}
        for name in names:
            stem, _, leaf = name.rpartition(".")
            empty = (
                leaf == "bias" and stem in forms and not biases and not as_array(tensors.tensor(name)).any()
            )
            if name not in own and not empty:
                self.parts[name] = None
        for stem, form in forms.items():
            if form is None:
                self.parts[f"{stem}.weight"] = (stem, "weight")
                continue
            self.forms[stem] = form
            self.parts |= {f"{stem}.weight.{part}": (stem, part) for part in form.components}
        kept = [stem for stem, form in forms.items() if form is None]
        if kept:
            log.warning(
                "%s: %d matrices (%s, ...) are in no format that is kept packed (a group for each input, by act-order, "
                "or a fused matrix beside an unquantised one): they are dequantised to bfloat16",
                tensors.path(kept[0] + ends[0]),
                len(kept),
                kept[0],
            )

    def _checked_shape(self, stem: str) -> tuple[int, int]:
        """(outputs, inputs) of a matrix; ShapeMismatch: its tensors do not have the declared layout."""
        how, tensors, ends = self._how, self.tensors, _ENDINGS[self._how.layout]
        zeros_too = how.layout == "qweight" or not how.symmetric
        names = [stem + ends[0], stem + ends[2], *([stem + ends[1]] if zeros_too else [])]
        if missing := next((name for name in names if name not in self._all), None):
            raise CheckpointError(f"the checkpoint has {names[0]}, but lacks {missing}: fetch it again")
        found = {name: (tensors.dtype(name), tensors.shape(name)) for name in names}
        codes, scales = found[names[0]][1], found[names[1]][1]
        where = tensors.path(names[0]).name
        if len(codes) != 2 or 0 in codes or 0 in scales or (len(scales) != 2 and how.layout == "qweight"):
            raise ShapeMismatch(
                f"{names[0]} and its scales in {where} are no matrices: {list(codes)}, {list(scales)}"
            )
        outputs, inputs = self._sizes(stem, codes, scales)
        groups, each = -(-inputs // (how.group or inputs)), 32 // how.bits
        words = -(-outputs // each)
        if how.layout == "scb":
            fits, whole = scales == (outputs,) and self._by_rows(stem), ()
        elif how.source == COMPRESSED:
            fits = scales in ((outputs, groups), *([(1,), ()] if how.group is None else []))
            width = inputs if how.layout == "int8" else -(-inputs // each)
            fits = fits and codes == (outputs, width)
            whole = (outputs, groups) if how.layout == "int8" else (words, groups)
        else:
            packed = (inputs // each, outputs) if how.source == "gptq" else (inputs, outputs // each)
            fits = codes == packed and scales == (groups, outputs) and outputs % each == 0
            whole = (groups, words)
        kind = "I8" if how.layout in _SIGNED else "I32"
        fits = fits and found[names[0]][0] == kind and found[names[1]][0] in ("F16", "BF16", "F32")
        if not fits or (zeros_too and found[names[2]] != (kind, whole)):
            listed = ", ".join(
                f"{name.removeprefix(stem)} {kind} {list(shape)}" for name, (kind, shape) in found.items()
            )
            raise ShapeMismatch(
                f"{stem} in {where} has {listed}, which is not the layout of {how.source} with {how.bits} bits and "
                f"groups of {how.group or 'all'} inputs"
            )
        return outputs, inputs

    def _sizes(self, stem: str, codes: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int]:
        """Outputs and inputs that the shapes of codes and scales imply."""
        how, each = self._how, 32 // self._how.bits
        if how.layout in _SIGNED:
            return codes[0], codes[1]
        if how.layout == "words":
            name = stem + ".weight_shape"
            if name not in self._all or self.tensors.shape(name) != (2,):
                raise CheckpointError(
                    f"the checkpoint has {stem}.weight_packed, but lacks a proper {name}: fetch it again"
                )
            outputs, inputs = (int(size) for size in as_array(self.tensors.tensor(name)))
            return (outputs, inputs) if 0 < inputs <= codes[1] * each else (codes[0], codes[1])
        return scales[1], codes[0] * each if how.source == "gptq" else codes[0]

    def _by_rows(self, stem: str) -> bool:
        """Whether a matrix of bitsandbytes is stored row by row, not in a layout of old GPU kernels."""
        name = stem + ".weight_format"
        if name not in self._all:
            return True
        if self.tensors.dtype(name) != "U8" or self.tensors.shape(name) not in ((), (1,)):
            raise CheckpointError(f"{name} in {self.tensors.path(name).name} must be one number of U8")
        if (code := int(as_array(self.tensors.tensor(name)).reshape(-1)[0])) != 0:
            raise CheckpointError(
                f"{name} in {self.tensors.path(name).name} is {code}, a layout of other kernels: only 0 (rows) is read"
            )
        return True

    def _form(self, stem: str) -> PackedForm | None:
        """The format of a matrix; None if none holds it."""
        how = self._how
        size = how.group or RUN
        group = RUN if size % RUN == 0 else size
        if group not in GROUPS or not self._consecutive(stem):
            return None
        short = self.tensors.dtype(stem + self._scales_end) == "F16" and how.layout != "scb"
        # GPTQ's first format may have the zero point 256 in 8 bits, which a byte does not hold.
        held = not how.symmetric and (how.bits == 4 or bool(self._zeros(stem).max() < 256))
        scales = "F16" if short and (how.symmetric or held) else "F32"
        return PackedForm(bits=how.bits, group=group, low=not how.symmetric, scales=scales, zero_points=held)

    def _consecutive(self, stem: str) -> bool:
        """Whether each group has consecutive inputs."""
        if (index := self._index(stem)) is None:
            return True
        size = self._how.group or len(index)
        return bool((index == np.arange(len(index)) // size).all())

    def _index(self, stem: str) -> Array | None:
        """The group of each input, checked; None: consecutive."""
        name, (_, inputs) = stem + self._index_end, self.shapes[stem]
        if name not in self._all:
            return None
        index = as_array(self.tensors.tensor(name))
        if self._how.source == COMPRESSED and (index == -1).all():
            return None  # not used
        groups = -(-inputs // (self._how.group or inputs))
        if index.shape != (inputs,) or index.dtype.kind != "i" or index.min() < 0 or index.max() >= groups:
            raise CheckpointError(
                f"{name} in {self.tensors.path(name).name} must name one of {groups} groups for each of {inputs} "
                "inputs"
            )
        return index

    def _codes(self, stem: str) -> Iterator[tuple[slice, Array]]:
        """Codes (outputs, inputs) of some outputs at a time."""
        words, (outputs, inputs) = as_array(self.tensors.tensor(stem + self.codes_end)), self.shapes[stem]
        step = max(8, _CHUNK // inputs // 8 * 8)
        for first in range(0, outputs, step):
            rows = slice(first, min(first + step, outputs))
            if self._how.layout in _SIGNED:
                yield rows, words[rows].view(np.uint8) ^ np.uint8(128)
            elif self._how.layout == "words":
                yield rows, _fields(np.ascontiguousarray(words[rows]), self._how.bits)[:, :inputs]
            elif self._how.source == "gptq":
                yield rows, _fields(np.ascontiguousarray(words[:, rows].T), self._how.bits)
            else:
                columns = np.ascontiguousarray(words[:, first // 8 : -(-rows.stop // 8)])
                yield rows, np.ascontiguousarray(_awq_order(_fields(columns, 4)).T)

    def _scales(self, stem: str) -> tuple[Array, Array]:
        """Scales and zero points (outputs, groups), float32 and integers."""
        name = stem + self._scales_end
        scales = np.asarray(as_array(self.tensors.tensor(name)), np.float32)
        zeros = self._zeros(stem)
        if self._how.layout == "scb":
            scales = (scales / np.float32(127))[:, None]
        elif self._how.source == COMPRESSED:
            scales = np.broadcast_to(
                scales.reshape(-1, scales.shape[-1] if scales.ndim == 2 else 1), zeros.shape
            )
        else:
            scales = scales.T
        if not np.isfinite(scales).all():
            raise CheckpointError(f"{name} in {self.tensors.path(name).name} has scales that are not finite")
        return scales, zeros

    def _zeros(self, stem: str) -> Array:
        """Zero points (outputs, groups), as codes."""
        how, (outputs, inputs), name = self._how, self.shapes[stem], stem + self._zeros_end
        middle, groups = 1 << how.bits - 1, -(-inputs // (how.group or inputs))
        if how.layout != "qweight" and how.symmetric:
            return np.full((outputs, groups), middle, np.int32)
        stored = np.ascontiguousarray(as_array(self.tensors.tensor(name)))
        if how.layout == "int8":
            return stored.reshape(-1, groups).astype(np.int32) + middle
        if how.layout == "words":
            return _fields(np.ascontiguousarray(stored.T), how.bits)[:, :outputs].T.astype(np.int32)
        fields = _fields(stored, how.bits)
        zeros = fields.astype(np.int32) + how.offset if how.source == "gptq" else _awq_order(fields)
        if how.symmetric and (zeros != middle).any():
            raise CheckpointError(
                f"{name} in {self.tensors.path(name).name} has zero points other than {middle}, but the declaration "
                "says sym=true: correct it"
            )
        return zeros.T

    def component(self, stem: str, form: PackedForm, part: str) -> Array:
        shape = self.shapes[stem]
        if part == "codes":
            made = np.empty(form.shape(part, shape), np.uint8)
            for rows, codes in self._codes(stem):
                made[rows] = pack_codes(codes, form.bits)
            return made
        scales, zeros = self._scales(stem)
        if part == "low":
            values = zeros if form.zero_points else scales * -zeros.astype(np.float32)
        else:
            values = scales
        size = self._how.group or -(-shape[1] // RUN) * RUN
        made = pack_groups(values, size, shape[1], form, part)
        if not np.isfinite(made).all():
            raise CheckpointError(
                f"{stem}{self._scales_end} has scales beyond fp16's range: the file is damaged"
            )
        return made

    def dequantised(self, stem: str) -> Array:
        (outputs, inputs), (scales, zeros) = self.shapes[stem], self._scales(stem)
        index = self._index(stem)
        if index is None:
            index = np.arange(inputs) // (self._how.group or inputs)
        made = np.empty((outputs, inputs), "<u2")
        for rows, codes in self._codes(stem):
            weights = (codes.astype(np.float32) - zeros[rows][:, index]) * scales[rows][:, index]
            made[rows] = (
                casts.cast(weights.astype(np.float32), "BF16", stem).view("<u2").reshape(weights.shape)
            )
        return made


def recognised(tensors: Tensors) -> str | None:
    """The tool that made these tensors, by their names, dtypes and shapes; None if there are no codes. "float8" may be
    fp8's or compressed-tensors'."""
    names = dict.fromkeys(tensors)
    if is_mlx(tensors, list(names)):
        return MLX
    if any(name.endswith("._weight_qdata") for name in names):
        return TORCHAO
    if any(STATE in name or name.endswith(".weight.absmax") for name in names):
        return f"{BITSANDBYTES} (4 bits)"
    if any(name.endswith(".SCB") for name in names):
        return f"{BITSANDBYTES} (8 bits)"
    if any(name.endswith(".weight_scale_inv") or tensors.dtype(name).startswith("F8") for name in names):
        return "float8"
    for name in names:
        weight = name.removesuffix("_scale")
        integers = name.endswith(".weight_scale") and weight in names and tensors.dtype(weight) == "I8"
        if integers or name.endswith(".weight_packed"):
            return COMPRESSED
    name = next((name for name in names if name.endswith(".qweight")), None)
    if name is None:
        return None
    scales = name.removesuffix(".qweight") + ".scales"
    whole = scales in names and tensors.shape(name)[-1:] == tensors.shape(scales)[-1:]
    return "gptq" if whole else "awq"


def _fields(words: Array, bits: int) -> Array:
    """The fields of 32-bit words (n, m), from the lowest bits on: (n, m * 32 / bits)."""
    parts = words.astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return parts
    fields = np.empty((parts.shape[0], parts.shape[1] * 2), np.uint8)
    fields[:, 0::2], fields[:, 1::2] = parts & 15, parts >> 4
    return fields


def _awq_order(fields: Array) -> Array:
    """The fields of AWQ's words in the order of outputs."""
    return fields.reshape(len(fields), -1, 8)[:, :, _AWQ_ORDER].reshape(len(fields), -1)
