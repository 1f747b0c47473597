"""Weights that MLX quantised, in this library's formats.

A matrix `X` is `X.weight`, uint32 (outputs, inputs * bits / 32): the codes of a row as one string of bits, from the
lowest bit of its first word on; `X.scales` and `X.biases` (outputs, groups). A weight is scale * code + bias.

Source: https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from monoblock.checkpoint import casts
from monoblock.checkpoint.array_adapters import adapter
from monoblock.checkpoint.mlx_config import MlxDeclaration, kept_bits
from monoblock.checkpoint.packed import Array, PackedForm, common_form, fused_members, pack_codes, pack_groups
from monoblock.checkpoint.weights import Tensors
from monoblock.errors import CheckpointError, ShapeMismatch

log = logging.getLogger("monoblock")

ENDINGS = (".weight", ".scales", ".biases")
_CHUNK = 1 << 21  # weights that are unpacked at a time
_FLOATS = ("F16", "BF16", "F32")


class MlxTensors:
    """A store's tensors, with each quantised matrix as codes, scale and low. Matrices that one product multiplies by
    have one format, the smallest that holds each; beside one that is not quantised they are dequantised to bfloat16."""

    def __init__(self, tensors: Tensors, how: MlxDeclaration, framework: str):
        self._tensors, self._how, self._arrays = tensors, how, adapter(framework)
        self._all = names = dict.fromkeys(tensors)
        stems = [name.removesuffix(".scales") for name in names if name.endswith(".scales")]
        self._shapes = {stem: self._checked_shape(stem) for stem in stems}
        own = {stem: self._own_form(stem) for stem in stems}
        self._forms: dict[str, PackedForm] = {}
        self._names: dict[str, tuple[str, str] | None] = {}
        stored = {f"{stem}{end}" for stem in stems for end in ENDINGS}
        self._names |= {name: None for name in names if name not in stored}
        dense: list[str] = []
        for stem in stems:
            members = [m for m in fused_members(stem) if f"{m}.weight" in names]
            if any(member not in own for member in members):
                dense.append(stem)
                self._names[f"{stem}.weight"] = (stem, "weight")
                continue
            form = common_form(own[member] for member in members)
            self._forms[stem] = form
            self._names |= {f"{stem}.weight.{part}": (stem, part) for part in form.components}
        if dense:
            log.warning(
                "%s: %d matrices (%s, ...) are fused with one that is not quantised: they are dequantised to bfloat16",
                tensors.path(f"{dense[0]}.weight"),
                len(dense),
                dense[0],
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
        return self._tensors.path(name if found is None else f"{found[0]}.weight")

    def tensor(self, name: str) -> Any:
        if (found := self._names[name]) is None:
            return self._tensors.tensor(name)
        stem, part = found
        made = self._dequantised(stem) if part == "weight" else self._component(stem, self._forms[stem], part)
        return self._arrays.from_buffer(made, self.dtype(name), made.shape)

    def inputs(self, name: str) -> int:
        """The inputs of the quantised matrix `X.weight`, without padding."""
        return self._shapes[name.removesuffix(".weight")][1]

    def _checked_shape(self, stem: str) -> tuple[int, int]:
        """(outputs, inputs) of a matrix; ShapeMismatch: its tensors do not have the declared layout."""
        tensors, names = self._tensors, [stem + end for end in ENDINGS]
        if missing := next((name for name in names if name not in self._all), None):
            raise CheckpointError(f"the checkpoint has {stem}.scales, but lacks {missing}: fetch it again")
        (kind, codes), scales, biases = ((tensors.dtype(name), tensors.shape(name)) for name in names)
        form = self._how.of(stem)
        fits = kind == "U32" and scales == biases and scales[0] in _FLOATS and len(codes) == 2
        if fits:
            inputs = codes[1] * 32 // form.bits
            whole = codes[1] * 32 % form.bits == 0 and inputs % form.group == 0 and 0 not in codes
            fits = whole and scales[1] == (codes[0], inputs // form.group)
        if not fits:
            raise ShapeMismatch(
                f"{stem} in {tensors.path(names[0]).name} has weight {kind} {list(codes)}, scales {scales[0]} "
                f"{list(scales[1])} and biases {biases[0]} {list(biases[1])}, which is not the layout of mlx with "
                f"{form.bits} bits and groups of {form.group} inputs"
            )
        return codes[0], codes[1] * 32 // form.bits

    def _own_form(self, stem: str) -> PackedForm:
        form, kinds = self._how.of(stem), {self._tensors.dtype(f"{stem}{end}") for end in ENDINGS[1:]}
        return PackedForm(bits=kept_bits(form.bits), group=form.group, low=True, wide=kinds != {"F16"})

    def _codes(self, stem: str) -> Iterator[tuple[slice, Array]]:
        """Codes (outputs, inputs) of some outputs at a time."""
        words, (outputs, inputs) = _array(self._tensors.tensor(f"{stem}.weight")), self._shapes[stem]
        step = max(8, _CHUNK // inputs)
        for first in range(0, outputs, step):
            rows = slice(first, min(first + step, outputs))
            yield rows, unpacked(np.ascontiguousarray(words[rows]), self._how.of(stem).bits)

    def _groups(self, stem: str, ending: str) -> Array:
        """Scales or biases (outputs, groups), float32."""
        values = np.asarray(_array(self._tensors.tensor(stem + ending)), np.float32)
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{stem}{ending} in {self._tensors.path(f'{stem}.weight').name} has numbers that are not finite"
            )
        return values

    def _component(self, stem: str, form: PackedForm, part: str) -> Array:
        shape = self._shapes[stem]
        if part != "codes":
            values = self._groups(stem, ".scales" if part == "scale" else ".biases")
            return pack_groups(values, self._how.of(stem).group, shape[1], form)
        made = np.empty(form.shape(part, shape), np.uint8)
        for rows, codes in self._codes(stem):
            made[rows] = pack_codes(codes, form.bits)
        return made

    def _dequantised(self, stem: str) -> Array:
        group = self._how.of(stem).group
        scales, biases = (
            np.repeat(self._groups(stem, ending), group, axis=1) for ending in (".scales", ".biases")
        )
        made = np.empty(self._shapes[stem], "<u2")
        for rows, codes in self._codes(stem):
            weights = codes.astype(np.float32) * scales[rows] + biases[rows]
            made[rows] = casts.cast(weights, "BF16", stem).view("<u2").reshape(weights.shape)
        return made


def unpacked(words: Array, bits: int) -> Array:
    """The codes (rows, m * 32 / bits) of words (rows, m), each row one string of bits."""
    parts = words.astype("<u4", copy=False).view(np.uint8)
    if bits == 8:
        return parts
    if bits in (2, 4):
        each, mask = 8 // bits, np.uint8((1 << bits) - 1)
        codes = np.empty((len(parts), parts.shape[1], each), np.uint8)
        for i in range(each):
            codes[..., i] = parts >> np.uint8(bits * i) & mask
        return codes.reshape(len(parts), -1)
    string = np.unpackbits(parts, axis=1, bitorder="little").reshape(len(parts), -1, bits)
    return np.packbits(string, axis=2, bitorder="little")[..., 0]


def is_mlx(tensors: Tensors, names: Sequence[str]) -> bool:
    """Whether there are matrices as MLX writes them, by names and dtypes."""
    known = frozenset(names)
    stems = (name.removesuffix(".biases") for name in names if name.endswith(".biases"))
    return any(
        f"{stem}.scales" in known and f"{stem}.weight" in known and tensors.dtype(f"{stem}.weight") == "U32"
        for stem in stems
    )


def _array(tensor: Any) -> Array:
    """A framework's tensor as a NumPy array; bfloat16 as float32."""
    if isinstance(tensor, np.ndarray):
        array: Any = cast("Any", tensor)
        return casts.widened(array) if casts.dtype_of(array) == "BF16" else array
    return (tensor.float() if str(tensor.dtype).endswith("bfloat16") else tensor).numpy()
