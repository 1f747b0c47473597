"""The layout of quantised matrices that were quantised by other tools, as NumPy arrays.

A matrix (outputs, inputs), with inputs padded to a multiple of 128, is `codes` uint8 (outputs, padded) in 8 bits or
(outputs, padded / 2) in 4 bits, `scale` (outputs, padded / group) and, if zero is not code 128, `low`. The same as
backends/pytorch/quantization/formats.py, whose docstring has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from monoblock.checkpoint.quantized import COMPONENTS

Array = np.ndarray[Any, Any]
RUN = 128  # inputs are padded to a multiple of this
# Matrices that one product multiplies by, which therefore have one format.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("Wq", "Wk", "Wv"))


@dataclass(frozen=True, kw_only=True)
class PackedForm:
    """The format of a quantised matrix: bits, group, whether it has `low`, and whether scale and low are float32."""

    bits: int
    group: int
    low: bool
    wide: bool

    def __post_init__(self) -> None:
        assert self.low or self.bits == 8

    @property
    def components(self) -> tuple[str, ...]:
        """The names of its tensors."""
        return COMPONENTS if self.low else COMPONENTS[:2]

    def dtype(self, component: str) -> str:
        """The safetensors name of a component's dtype."""
        return "U8" if component == "codes" else "F32" if self.wide else "F16"

    def shape(self, component: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a component of a matrix of that shape."""
        padded = -(-shape[1] // RUN) * RUN
        return shape[0], padded * self.bits // 8 if component == "codes" else padded // self.group


def fused_members(stem: str) -> list[str]:
    """The matrices that are fused with this one, itself included; names without ".weight"."""
    owner, _, own = stem.rpartition(".")
    group = next((group for group in _FUSED if own in group), (own,))
    return [f"{owner}.{member}" if owner else member for member in group]


def common_form(forms: Iterable[PackedForm]) -> PackedForm:
    """The format that holds matrices of all these formats, so that one product can multiply by them."""
    forms = tuple(forms)
    low = any(form.low for form in forms)
    # A low that is computed from a scale may exceed fp16.
    derived = low and len(set(forms)) > 1
    return PackedForm(
        bits=max(form.bits for form in forms),
        group=min(form.group for form in forms),
        low=low,
        wide=derived or any(form.wide for form in forms),
    )


def pack_codes(codes: Array, bits: int) -> Array:
    """Codes (rows, inputs), one in each byte, in the layout of the format."""
    rows, inputs = codes.shape
    if inputs % RUN:
        codes = np.pad(codes, ((0, 0), (0, -inputs % RUN)))
    if bits == 8:
        return np.ascontiguousarray(codes)
    halves = codes.reshape(rows, -1, 2, RUN // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(rows, -1)


def pack_groups(values: Array, size: int, inputs: int, form: PackedForm) -> Array:
    """Scales or lows (rows, groups of `size` inputs) in the layout of the format, padded with zeros."""
    padded, group = -(-inputs // RUN) * RUN, form.group
    if size > group:
        values = np.repeat(values, size // group, axis=1)
    values = values[:, : padded // group]
    if values.shape[1] < padded // group:
        values = np.pad(values, ((0, 0), (0, padded // group - values.shape[1])))
    return np.require(values, np.float32 if form.wide else np.float16, ["C", "W"])
