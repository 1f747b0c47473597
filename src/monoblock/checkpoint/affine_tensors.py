"""Base of the readers of matrices whose weights are scale * code + low by groups of inputs, in this library's
formats."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from monoblock.checkpoint import casts
from monoblock.checkpoint.packed import (
    ZEROS,
    Array,
    PackedForm,
    common_form,
    fused_members,
    pack_codes,
    pack_groups,
)
from monoblock.checkpoint.quantized_view import QuantizedView
from monoblock.checkpoint.weights import Tensors

log = logging.getLogger("monoblock")

_CHUNK = 1 << 21  # weights that are unpacked at a time


class AffineTensors(QuantizedView):
    """A store's tensors, with each quantised matrix as codes, scale and low. Matrices that one product multiplies by
    have one format, the smallest that holds each. A matrix that no format holds, and one that is fused with such a one
    or with one that is not quantised, is dequantised to bfloat16."""

    endings: ClassVar[tuple[str, ...]]  # of the names of all its tensors

    def __init__(self, tensors: Tensors, framework: str):
        super().__init__(tensors, framework)
        self.names = names = dict.fromkeys(tensors)
        stems = self.stems()
        self.shapes = {stem: self.checked_shape(stem) for stem in stems}
        own = self._own = {stem: self.own_form(stem) for stem in stems}
        stored = {f"{stem}{end}" for stem in stems for end in self.endings}
        self.parts = {name: None for name in names if name not in stored}
        dense: list[str] = []
        for stem in stems:
            members = [m for m in fused_members(stem) if m in own or f"{m}.weight" in names]
            forms = [own.get(member) for member in members]
            held = [form for form in forms if form is not None]
            if len(held) < len(forms):
                dense.append(stem)
                self.parts[f"{stem}.weight"] = (stem, "weight")
                continue
            form = self.forms[stem] = common_form(held)
            self.parts |= {f"{stem}.weight.{part}": (stem, part) for part in form.components}
        if dense:
            log.warning(
                "%s: %d matrices (%s, ...) are in groups that no packed format has, or fused with one that is not "
                "quantised: they are dequantised to bfloat16",
                tensors.path(f"{dense[0]}{self.codes_end}"),
                len(dense),
                dense[0],
            )

    @abstractmethod
    def stems(self) -> list[str]:
        """The names of the quantised matrices, without endings."""

    @abstractmethod
    def checked_shape(self, stem: str) -> tuple[int, int]:
        """(outputs, inputs) of a matrix. CheckpointError, ShapeMismatch: its tensors do not have the layout."""

    @abstractmethod
    def own_form(self, stem: str) -> PackedForm | None:
        """The format that holds a matrix; None if there is none."""

    @abstractmethod
    def group(self, stem: str) -> int:
        """The inputs that share a scale."""

    @abstractmethod
    def codes(self, stem: str, rows: slice) -> Array:
        """The codes (outputs, inputs) of some outputs, from 0 on, one in each byte."""

    @abstractmethod
    def scales(self, stem: str) -> Array:
        """Scales (outputs, groups), float32."""

    @abstractmethod
    def lows(self, stem: str) -> Array:
        """What is added to scale * code (outputs, groups), float32."""

    def zero_points(self, stem: str) -> Array:
        """The codes of 0 (outputs, groups), 0 to 255, of a matrix in a form that has them."""
        raise NotImplementedError(f"{type(self).__name__} has no form with zero points ({stem})")

    def _chunks(self, stem: str) -> Iterator[slice]:
        outputs, inputs = self.shapes[stem]
        step = max(8, _CHUNK // inputs)
        return (slice(first, min(first + step, outputs)) for first in range(0, outputs, step))

    def component(self, stem: str, form: PackedForm, part: str) -> Array:
        shape = self.shapes[stem]
        if part != "codes":
            read = self.scales if part == "scale" else self.zero_points if form.zero_points else self.lows
            # A group of a whole row ends with the row's padding.
            size = self.group(stem) if self.group(stem) % form.group == 0 else -(-shape[1] // 128) * 128
            return pack_groups(read(stem), size, shape[1], form, part)
        made, own = np.empty(form.shape(part, shape), np.uint8), self._own[stem]
        assert own is not None
        # Without a low, the code of 0 is that of the format.
        shift = np.uint8(0 if form.low else ZEROS[form.bits] - ZEROS[own.bits])
        for rows in self._chunks(stem):
            made[rows] = pack_codes(self.codes(stem, rows) + shift, form.bits)
        return made

    def dequantised(self, stem: str) -> Array:
        group, (outputs, inputs) = self.group(stem), self.shapes[stem]
        scales, lows = (np.repeat(x, group, axis=1) for x in (self.scales(stem), self.lows(stem)))
        made = np.empty((outputs, inputs), "<u2")
        for rows in self._chunks(stem):
            weights = self.codes(stem, rows).astype(np.float32) * scales[rows] + lows[rows]
            made[rows] = casts.cast(weights, "BF16", stem).view("<u2").reshape(weights.shape)
        return made
