"""The layout of quantised matrices that were quantised by other tools, as NumPy arrays.

A matrix (outputs, inputs), with inputs padded to a multiple of 128, is `codes` uint8 (outputs, padded) in 8 bits or
(outputs, padded / 2) in 4 bits, `scale` (outputs, padded / group) and, unless code 128 or 8 is 0, `low`. The same as
backends/pytorch/quantization/formats.py, whose docstring has the formulas.

Scales and lows are float16, float32 or two-level: in each row first an int8 factor per group, then an fp16 number per
super-block of 256 weights, all as bytes. The value of a group is their product. Beside scales of float16 or float32,
`low` may instead have zero points: the code of 0 of each group, uint8 (outputs, padded / group).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from monoblock.checkpoint.quantized import COMPONENTS

Array = np.ndarray[Any, Any]
RUN = 128  # inputs are padded to a multiple of this
SUPER_BLOCK = 256  # weights that share an fp16 number in two-level scales
TWO_LEVEL = "U8"
ZERO_POINTS = "U8"  # the dtype of `low` that has them
GROUPS, TWO_LEVEL_GROUPS = (16, 32, 64, 128), (16, 32)
ZEROS = {8: 128, 4: 8}  # bits -> the code of 0 without a low
_NUMPY = {"F16": np.float16, "F32": np.float32, ZERO_POINTS: np.uint8}
# Matrices that one product multiplies by, which therefore have one format.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("Wq", "Wk", "Wv"))


@dataclass(frozen=True, kw_only=True)
class PackedForm:
    """The format of a quantised matrix: bits, group, whether it has `low`, the dtype that stores scale and low ("F16",
    "F32", or TWO_LEVEL), by safetensors' name, and whether its `low` has zero points in place of lows."""

    bits: int
    group: int
    low: bool
    scales: str
    zero_points: bool = False

    @property
    def components(self) -> tuple[str, ...]:
        """The names of its tensors."""
        return COMPONENTS if self.low else COMPONENTS[:2]

    def dtype(self, component: str) -> str:
        """The safetensors name of a component's dtype."""
        if component == "low" and self.zero_points:
            return ZERO_POINTS
        return "U8" if component == "codes" else self.scales

    def shape(self, component: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a component of a matrix of that shape."""
        padded = -(-shape[1] // RUN) * RUN
        if component == "codes":
            return shape[0], padded * self.bits // 8
        return shape[0], scale_width(padded, self.group, two_level=self.scales == TWO_LEVEL)


def scale_width(padded: int, group: int, *, two_level: bool) -> int:
    """The elements of a row of scales or lows."""
    return padded // group + (padded // SUPER_BLOCK * 2 if two_level else 0)


def group_of(width: int, padded: int, *, two_level: bool) -> int | None:
    """The group of a matrix whose rows have so many elements of scales; None: there is no such format."""
    groups = TWO_LEVEL_GROUPS if two_level and padded % SUPER_BLOCK == 0 else () if two_level else GROUPS
    return next((g for g in groups if scale_width(padded, g, two_level=two_level) == width), None)


def fused_members(stem: str) -> list[str]:
    """The matrices that are fused with this one, itself included; names without ".weight"."""
    owner, _, own = stem.rpartition(".")
    group = next((group for group in _FUSED if own in group), (own,))
    return [f"{owner}.{member}" if owner else member for member in group]


def common_form(forms: Iterable[PackedForm]) -> PackedForm:
    """The format that holds matrices of all these formats, so that one product can multiply by them."""
    forms = tuple(forms)
    low = any(form.low for form in forms)
    scales = {form.scales for form in forms}
    # A form without a low has one zero point for all groups.
    zero_points = low and TWO_LEVEL not in scales and all(form.zero_points for form in forms if form.low)
    # A low that is computed from a scale may exceed fp16; a power of two times an fp16 number of two levels does not.
    derived = low and not zero_points and len(set(forms)) > 1 and scales != {TWO_LEVEL}
    return PackedForm(
        bits=max(form.bits for form in forms),
        group=min(form.group for form in forms),
        low=low,
        scales="F32" if derived or len(scales) > 1 else scales.pop(),
        zero_points=zero_points,
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


def pack_groups(values: Array, size: int, inputs: int, form: PackedForm, part: str) -> Array:
    """The scales or lows (`part`) of rows, (rows, groups of `size` inputs), in the layout of the format, padded with
    zeros."""
    padded, group = -(-inputs // RUN) * RUN, form.group
    if size > group:
        values = np.repeat(values, size // group, axis=1)
    values = values[:, : padded // group]
    if values.shape[1] < padded // group:
        values = np.pad(values, ((0, 0), (0, padded // group - values.shape[1])))
    return np.require(values, _NUMPY[form.dtype(part)], ["C", "W"])


def scale_values(stored: Array, group: int, padded: int) -> Array:
    """The float32 values (rows, groups) of a matrix's scales, or of lows that are no zero points, as a form stores
    them."""
    if stored.dtype != np.uint8:
        return stored.astype(np.float32)
    groups = padded // group
    factors = stored[:, :groups].view(np.int8).astype(np.float32)
    halves = np.ascontiguousarray(stored[:, groups:]).view("<f2").astype(np.float32)
    return factors * np.repeat(halves, SUPER_BLOCK // group, axis=1)
