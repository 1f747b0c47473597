"""Weights that GPTQ or AWQ quantised, as components of this library's formats.

A matrix `X` is stored as `X.qweight`, codes in 32-bit words; `X.qzeros`, zero points in words; `X.scales` (groups,
outputs); and in GPTQ `X.g_idx`, the group of each input. A weight is scale * (code - zero).

    GPTQ        qweight (inputs * bits / 32, outputs): a word has consecutive inputs, the first in its lowest bits;
                qzeros (groups, outputs * bits / 32): consecutive outputs; in the first format, zero - 1 is stored
    AWQ (gemm)  qweight (inputs, outputs / 8): the outputs 0, 2, 4, 6, 1, 3, 5, 7 of each eight from the lowest bits on;
                qzeros (groups, outputs / 8): likewise

Sources: https://github.com/AutoGPTQ/AutoGPTQ (qlinear) and https://github.com/casper-hansen/AutoAWQ (WQLinear_GEMM).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from monoblock.checkpoint import casts
from monoblock.checkpoint.array_adapters import adapter
from monoblock.checkpoint.packed import RUN, Array, PackedForm, pack_codes, pack_groups
from monoblock.checkpoint.packed_config import PackedDeclaration
from monoblock.checkpoint.weights import Tensors
from monoblock.errors import CheckpointError, ShapeMismatch

log = logging.getLogger("monoblock")

CODES, ZEROS, SCALES, INDEX = ".qweight", ".qzeros", ".scales", ".g_idx"
_GROUPS = (16, 32, 64, 128)
# Matrices that one product multiplies by, which therefore have one format.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("Wq", "Wk", "Wv"))
_AWQ_ORDER = np.array((0, 4, 1, 5, 2, 6, 3, 7))  # where the outputs of a word are
_CHUNK = 1 << 21  # weights that are unpacked at a time


class PackedTensors:
    """A store's tensors, with each quantised matrix as codes, scale and low, or dequantised to bfloat16.

    `biases`: whether the model's matrices have biases; if not, biases of zeros, which some tools write, are left out.
    """

    def __init__(self, tensors: Tensors, how: PackedDeclaration, framework: str, *, biases: bool):
        self._tensors, self._how, self._arrays = tensors, how, adapter(framework)
        names = dict.fromkeys(tensors)
        stems = [name.removesuffix(CODES) for name in names if name.endswith(CODES)]
        self._shapes = {stem: _checked_shape(tensors, stem, how) for stem in stems}
        forms = {stem: self._form(stem) for stem in stems}
        for stem in stems:
            here = [member for member in _members(stem) if member in forms or f"{member}.weight" in names]
            if any(forms.get(member) is None for member in here):  # not packed, or not quantised
                forms |= dict.fromkeys((member for member in here if member in forms), None)
        # Name -> the matrix and the component, or the stored name.
        self._names: dict[str, tuple[str, str] | None] = {}
        own = {f"{stem}{end}" for stem in stems for end in (CODES, ZEROS, SCALES, INDEX)}
        for name in names:
            stem, _, leaf = name.rpartition(".")
            empty = leaf == "bias" and stem in forms and not biases and not _array(tensors.tensor(name)).any()
            if name not in own and not empty:
                self._names[name] = None
        self._forms: dict[str, PackedForm] = {}
        for stem, form in forms.items():
            if form is None:
                self._names[f"{stem}.weight"] = (stem, "weight")
                continue
            self._forms[stem] = form
            self._names |= {f"{stem}.weight.{part}": (stem, part) for part in form.components}
        kept = [stem for stem, form in forms.items() if form is None]
        if kept:
            log.warning(
                "%s: %d matrices (%s, ...) are in no format that is kept packed (a group for each input, by act-order, "
                "or a fused matrix beside an unquantised one): they are dequantised to bfloat16",
                tensors.path(kept[0] + CODES),
                len(kept),
                kept[0],
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        if (found := self._names[name]) is None:
            return self._tensors.shape(name)
        stem, part = found
        return self._shapes[stem] if part == "weight" else self._forms[stem].shape(part, self._shapes[stem])

    def dtype(self, name: str) -> str:
        if (found := self._names[name]) is None:
            return self._tensors.dtype(name)
        stem, part = found
        return "BF16" if part == "weight" else self._forms[stem].dtype(part)

    def path(self, name: str) -> Path:
        found = self._names[name]
        return self._tensors.path(name if found is None else found[0] + CODES)

    def tensor(self, name: str) -> Any:
        if (found := self._names[name]) is None:
            return self._tensors.tensor(name)
        stem, part = found
        made = self._dequantised(stem) if part == "weight" else self._component(stem, self._forms[stem], part)
        return self._arrays.from_buffer(made, self.dtype(name), made.shape)

    def _form(self, stem: str) -> PackedForm | None:
        """The format of a matrix; None if none holds it."""
        how = self._how
        size = how.group or RUN
        group = RUN if size % RUN == 0 else size
        if group not in _GROUPS or not self._consecutive(stem):
            return None
        short = self._tensors.dtype(stem + SCALES) == "F16"
        middle = how.symmetric  # then low is a power of two times the scale
        low = not (middle and how.bits == 8)
        return PackedForm(bits=how.bits, group=group, low=low, wide=not (short and middle))

    def _consecutive(self, stem: str) -> bool:
        """Whether each group has consecutive inputs."""
        if (index := self._index(stem)) is None:
            return True
        size = self._how.group or len(index)
        return bool((index == np.arange(len(index)) // size).all())

    def _index(self, stem: str) -> Array | None:
        """The group of each input, checked; None: consecutive."""
        name, (_, inputs) = stem + INDEX, self._shapes[stem]
        if name not in set(self._tensors):
            return None
        index = _array(self._tensors.tensor(name))
        groups = self._tensors.shape(stem + SCALES)[0]
        if index.shape != (inputs,) or index.dtype.kind != "i" or index.min() < 0 or index.max() >= groups:
            raise CheckpointError(
                f"{name} in {self._tensors.path(name).name} must name one of {groups} groups for each of {inputs} "
                "inputs"
            )
        return index

    def _codes(self, stem: str) -> Iterator[tuple[slice, Array]]:
        """Codes (outputs, inputs) of some outputs at a time."""
        words, (outputs, inputs) = _array(self._tensors.tensor(stem + CODES)), self._shapes[stem]
        step = max(8, _CHUNK // inputs // 8 * 8)
        for first in range(0, outputs, step):
            rows = slice(first, min(first + step, outputs))
            if self._how.source == "gptq":
                yield rows, _fields(np.ascontiguousarray(words[:, rows].T), self._how.bits)
            else:
                columns = np.ascontiguousarray(words[:, first // 8 : -(-rows.stop // 8)])
                yield rows, np.ascontiguousarray(_awq_order(_fields(columns, 4)).T)

    def _scales(self, stem: str) -> tuple[Array, Array]:
        """Scales and zero points (outputs, groups), float32 and integers."""
        words = np.ascontiguousarray(_array(self._tensors.tensor(stem + ZEROS)))
        zeros = _fields(words, self._how.bits)
        zeros = zeros.astype(np.int32) + self._how.offset if self._how.source == "gptq" else _awq_order(zeros)
        middle = 1 << self._how.bits - 1
        if self._how.symmetric and (zeros != middle).any():
            raise CheckpointError(
                f"{stem}{ZEROS} in {self._tensors.path(stem + ZEROS).name} has zero points other than {middle}, but "
                "the declaration says sym=true: correct it"
            )
        scales = np.asarray(_array(self._tensors.tensor(stem + SCALES)), np.float32)
        if not np.isfinite(scales).all():
            raise CheckpointError(
                f"{stem}{SCALES} in {self._tensors.path(stem + SCALES).name} has scales that are not finite"
            )
        return scales.T, zeros.T

    def _component(self, stem: str, form: PackedForm, part: str) -> Array:
        shape = self._shapes[stem]
        if part == "codes":
            made = np.empty(form.shape(part, shape), np.uint8)
            for rows, codes in self._codes(stem):
                made[rows] = pack_codes(codes, form.bits)
            return made
        scales, zeros = self._scales(stem)
        values = scales if part == "scale" else scales * -zeros.astype(np.float32)
        size = self._how.group or -(-shape[1] // RUN) * RUN
        made = pack_groups(values, size, shape[1], form)
        if not np.isfinite(made).all():
            raise CheckpointError(f"{stem}{SCALES} has scales beyond fp16's range: the file is damaged")
        return made

    def _dequantised(self, stem: str) -> Array:
        (outputs, inputs), (scales, zeros) = self._shapes[stem], self._scales(stem)
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


def _members(stem: str) -> list[str]:
    """The matrices that are fused with this one, itself included."""
    owner, _, own = stem.rpartition(".")
    group = next((group for group in _FUSED if own in group), (own,))
    return [f"{owner}.{member}" if owner else member for member in group]


def _checked_shape(tensors: Tensors, stem: str, how: PackedDeclaration) -> tuple[int, int]:
    """(outputs, inputs) of a matrix; ShapeMismatch: its tensors do not have the declared layout."""
    names = [stem + end for end in (CODES, ZEROS, SCALES)]
    known = set(tensors)
    if missing := next((name for name in names if name not in known), None):
        raise CheckpointError(f"the checkpoint has {names[0]}, but lacks {missing}: fetch it again")
    codes, zeros, scales = (tensors.shape(name) for name in names)
    where, each = tensors.path(names[0]).name, 32 // how.bits
    if any(len(shape) != 2 for shape in (codes, zeros, scales)) or 0 in (*codes, *scales):
        raise ShapeMismatch(
            f"{names[0]} and its scales in {where} are no matrices: {list(codes)}, {list(scales)}"
        )
    groups, outputs = scales
    inputs = codes[0] * each if how.source == "gptq" else codes[0]
    width = outputs if how.source == "gptq" else outputs // each
    wanted = -(-inputs // (how.group or inputs))
    fits = (
        outputs % each == 0 and codes[1] == width and zeros == (groups, outputs // each) and groups == wanted
    )
    kinds = [tensors.dtype(name) for name in names]
    if not fits or kinds[:2] != ["I32", "I32"] or kinds[2] not in ("F16", "BF16", "F32"):
        raise ShapeMismatch(
            f"{stem} in {where} has qweight {kinds[0]} {list(codes)}, qzeros {kinds[1]} {list(zeros)} and scales "
            f"{kinds[2]} {list(scales)}, which is not the layout of {how.source} with {how.bits} bits and groups of "
            f"{how.group or 'all'} inputs"
        )
    return outputs, inputs


def recognised(tensors: Tensors) -> str | None:
    """The tool that made these tensors, by their shapes; None if there is no `qweight`."""
    name = next((name for name in tensors if name.endswith(CODES)), None)
    if name is None:
        return None
    scales = name.removesuffix(CODES) + SCALES
    whole = scales in set(tensors) and tensors.shape(name)[-1:] == tensors.shape(scales)[-1:]
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


def _array(tensor: Any) -> Array:
    """A framework's tensor as a NumPy array; bfloat16 as float32."""
    if isinstance(tensor, np.ndarray):
        array: Any = cast("Any", tensor)
        return casts.widened(array) if casts.dtype_of(array) == "BF16" else array
    return (tensor.float() if str(tensor.dtype).endswith("bfloat16") else tensor).numpy()
