"""Base of the readers of matrices whose weights are scale * code + low by groups of inputs, in this library's
formats."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from monoblock.checkpoint import casts
from monoblock.checkpoint.array_adapters import adapter
from monoblock.checkpoint.packed import Array, PackedForm, common_form, fused_members, pack_codes, pack_groups
from monoblock.checkpoint.weights import Tensors

log = logging.getLogger("monoblock")

_CHUNK = 1 << 21  # weights that are unpacked at a time


class AffineTensors(ABC):
    """A store's tensors, with each quantised matrix as codes, scale and low. Matrices that one product multiplies by
    have one format, the smallest that holds each. A matrix that no format holds, and one that is fused with such a one
    or with one that is not quantised, is dequantised to bfloat16."""

    codes_end: ClassVar[str]  # of the name of a matrix's codes
    endings: ClassVar[tuple[str, ...]]  # of the names of all its tensors

    def __init__(self, tensors: Tensors, framework: str):
        self.tensors, self._arrays = tensors, adapter(framework)
        self.names = names = dict.fromkeys(tensors)
        stems = self.stems()
        self.shapes = {stem: self.checked_shape(stem) for stem in stems}
        own = {stem: self.own_form(stem) for stem in stems}
        self._forms: dict[str, PackedForm] = {}
        stored = {f"{stem}{end}" for stem in stems for end in self.endings}
        # Name -> the matrix and the component, or None: as stored.
        self._names: dict[str, tuple[str, str] | None] = {name: None for name in names if name not in stored}
        dense: list[str] = []
        for stem in stems:
            members = [m for m in fused_members(stem) if m in own or f"{m}.weight" in names]
            forms = [own.get(member) for member in members]
            held = [form for form in forms if form is not None]
            if len(held) < len(forms):
                dense.append(stem)
                self._names[f"{stem}.weight"] = (stem, "weight")
                continue
            form = self._forms[stem] = common_form(held)
            self._names |= {f"{stem}.weight.{part}": (stem, part) for part in form.components}
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

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, a component or a dequantised matrix."""
        if (found := self._names[name]) is None:
            return self.tensors.shape(name)
        stem, part = found
        return self.shapes[stem] if part == "weight" else self._forms[stem].shape(part, self.shapes[stem])

    def dtype(self, name: str) -> str:
        """Its dtype, by safetensors' name."""
        if (found := self._names[name]) is None:
            return self.tensors.dtype(name)
        stem, part = found
        return "BF16" if part == "weight" else self._forms[stem].dtype(part)

    def path(self, name: str) -> Path:
        """The file that holds it."""
        found = self._names[name]
        return self.tensors.path(name if found is None else f"{found[0]}{self.codes_end}")

    def tensor(self, name: str) -> Any:
        """The tensor itself."""
        if (found := self._names[name]) is None:
            return self.tensors.tensor(name)
        stem, part = found
        made = self._dequantised(stem) if part == "weight" else self._component(stem, self._forms[stem], part)
        return self._arrays.from_buffer(made, self.dtype(name), made.shape)

    def inputs(self, name: str) -> int:
        """The inputs of the quantised matrix `X.weight`, without padding."""
        return self.shapes[name.removesuffix(".weight")][1]

    def _chunks(self, stem: str) -> Iterator[slice]:
        outputs, inputs = self.shapes[stem]
        step = max(8, _CHUNK // inputs)
        return (slice(first, min(first + step, outputs)) for first in range(0, outputs, step))

    def _component(self, stem: str, form: PackedForm, part: str) -> Array:
        shape = self.shapes[stem]
        if part != "codes":
            values = self.scales(stem) if part == "scale" else self.lows(stem)
            # A group of a whole row ends with the row's padding.
            size = self.group(stem) if self.group(stem) % form.group == 0 else -(-shape[1] // 128) * 128
            return pack_groups(values, size, shape[1], form)
        made = np.empty(form.shape(part, shape), np.uint8)
        for rows in self._chunks(stem):
            made[rows] = pack_codes(self.codes(stem, rows), form.bits)
        return made

    def _dequantised(self, stem: str) -> Array:
        group, (outputs, inputs) = self.group(stem), self.shapes[stem]
        scales, lows = (np.repeat(x, group, axis=1) for x in (self.scales(stem), self.lows(stem)))
        made = np.empty((outputs, inputs), "<u2")
        for rows in self._chunks(stem):
            weights = self.codes(stem, rows).astype(np.float32) * scales[rows] + lows[rows]
            made[rows] = casts.cast(weights, "BF16", stem).view("<u2").reshape(weights.shape)
        return made


def as_array(tensor: Any) -> Array:
    """A framework's tensor as a NumPy array; bfloat16 as float32."""
    if isinstance(tensor, np.ndarray):
        array: Any = cast("Any", tensor)
        return casts.widened(array) if casts.dtype_of(array) == "BF16" else array
    return (tensor.float() if str(tensor.dtype).endswith("bfloat16") else tensor).numpy()
