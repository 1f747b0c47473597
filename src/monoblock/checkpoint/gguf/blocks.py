"""The blocks of ggml's quantised types as codes, scales and lows.

A type has blocks of 32 or 256 weights of a row. Each is held as an integer code per weight and, per group of 16 or 32
weights, a scale and a low: weight = scale * code + low, or scale * (code - zero) for types whose `zero` is one number.
K-quants have scales of two levels: an fp16 number per block of 256 weights times a small integer per group.
All products and sums here are exact in float32 or rounded once, as in the reference dequantiser, so that the weights
are those of the reference to the bit. Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from monoblock.checkpoint.packed import TWO_LEVEL

Array = np.ndarray[Any, Any]


class TwoLevel(NamedTuple):
    """Scales or lows: a number per block, fp16 (n, 1), times a factor per group, int8 (n, groups)."""

    number: Array
    factors: Array

    def values(self) -> Array:
        """The products, (n, groups), exact in float32."""
        return self.number.astype(np.float32) * self.factors.astype(np.float32)


Numbers = Array | TwoLevel
Scales = tuple[Numbers, Numbers | None]  # scale, and low unless `zero` gives it

# The levels of IQ4_NL and IQ4_XS.
_LEVELS = np.array((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.int16)
LEVEL_CODES = (_LEVELS + 128).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class BlockForm:
    """How the blocks of a type are held: the codes' bits (8 or 4), weights of a group, the code of 0 (None: each group
    has a low), and how scales and lows are stored: "F16", or TWO_LEVEL."""

    bits: int
    group: int
    zero: int | None
    stored: str
    codes: Callable[[Array], Array]  # blocks (n, bytes) -> (n, weights) uint8
    scales: Callable[[Array], Scales]  # blocks (n, bytes) -> (n, groups) each


def _halves(blocks: Array, at: int) -> Array:
    """An fp16 number of each block, (n, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")


def _nibbles(qs: Array) -> Array:
    """The low halves of the bytes (n, m), then their high halves: (n, 2 m)."""
    return np.concatenate((qs & 15, qs >> 4), axis=-1)


def _fields(packed: Array, bits: int, width: int) -> Array:
    """Fields of `bits` of each byte (n, m): for each run of `width` bytes the lowest fields, then the next ones."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = packed.reshape(len(packed), -1, 1, width)
    return (runs >> shifts & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)


def _fifth_bits(qh: Array) -> Array:
    """32 bits of 4 bytes (n, 4), shifted to bit 4."""
    return np.unpackbits(qh, axis=1, bitorder="little") << 4


def _half_scale(blocks: Array) -> Scales:
    return _halves(blocks, 0), None


def _half_scale_and_low(blocks: Array) -> Scales:
    return _halves(blocks, 0), _halves(blocks, 2)


def _six_bit_pairs(blocks: Array) -> Scales:
    """Q4_K and Q5_K: d, dmin, and 8 pairs of 6-bit factors in 12 bytes; scale = d * first, low = -dmin * second."""
    s = blocks[:, 4:16]
    low, high, rest = s[:, 0:4], s[:, 4:8], s[:, 8:12]
    first = np.concatenate((low & 63, rest & 15 | low >> 6 << 4), axis=1)
    second = np.concatenate((high & 63, rest >> 4 | high >> 6 << 4), axis=1)
    return TwoLevel(_halves(blocks, 0), first.view(np.int8)), TwoLevel(
        _halves(blocks, 2), -second.view(np.int8)
    )


def _q2_k_scales(blocks: Array) -> Scales:
    s = blocks[:, :16]
    first, second = (s & 15).view(np.int8), (s >> 4).view(np.int8)
    return TwoLevel(_halves(blocks, 80), first), TwoLevel(_halves(blocks, 82), -second)


def _q3_k_scales(blocks: Array) -> Scales:
    """16 factors of 6 bits in 12 bytes: the low 4 bits in the first 8, the high 2 in the last 4."""
    low, high = _nibbles(blocks[:, 96:104]), _fields(blocks[:, 104:108], 2, 4)
    return TwoLevel(_halves(blocks, 108), (low | high << 4).view(np.int8) - np.int8(32)), None


def _q6_k_scales(blocks: Array) -> Scales:
    return TwoLevel(_halves(blocks, 208), np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)), None


def _iq4_xs_scales(blocks: Array) -> Scales:
    """8 factors of 6 bits: the low 4 bits in 4 bytes, two in each, the high 2 in a 16-bit word."""
    low = _fields(blocks[:, 4:8], 4, 1)
    high = _fields(np.ascontiguousarray(blocks[:, 2:4]), 2, 1)
    return TwoLevel(_halves(blocks, 0), (low | high << 4).view(np.int8) - np.int8(32)), None


def _q3_k_codes(blocks: Array) -> Array:
    return _fields(blocks[:, 32:96], 2, 32) | _fields(blocks[:, :32], 1, 32) << 2


def _q5_k_codes(blocks: Array) -> Array:
    return _fields(blocks[:, 48:], 4, 32) | _fields(blocks[:, 16:48], 1, 32) << 4


def _q6_k_codes(blocks: Array) -> Array:
    return _fields(blocks[:, :128], 4, 64) | _fields(blocks[:, 128:192], 2, 32) << 4


def _form(
    bits: int,
    group: int,
    zero: int | None,
    stored: str,
    codes: Callable[[Array], Array],
    scales: Callable[[Array], Scales],
) -> BlockForm:
    return BlockForm(bits=bits, group=group, zero=zero, stored=stored, codes=codes, scales=scales)


FORMS: Mapping[str, BlockForm] = {
    "Q4_0": _form(4, 32, 8, "F16", lambda b: _nibbles(b[:, 2:]), _half_scale),
    "Q4_1": _form(4, 32, None, "F16", lambda b: _nibbles(b[:, 4:]), _half_scale_and_low),
    "Q5_0": _form(8, 32, 16, "F16", lambda b: _nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6]), _half_scale),
    "Q5_1": _form(
        8, 32, None, "F16", lambda b: _nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8]), _half_scale_and_low
    ),
    "Q8_0": _form(8, 32, 128, "F16", lambda b: b[:, 2:] ^ 128, _half_scale),
    "Q2_K": _form(4, 16, None, TWO_LEVEL, lambda b: _fields(b[:, 16:80], 2, 32), _q2_k_scales),
    "Q3_K": _form(4, 16, 4, TWO_LEVEL, _q3_k_codes, _q3_k_scales),
    "Q4_K": _form(4, 32, None, TWO_LEVEL, lambda b: _fields(b[:, 16:], 4, 32), _six_bit_pairs),
    "Q5_K": _form(8, 32, None, TWO_LEVEL, _q5_k_codes, _six_bit_pairs),
    "Q6_K": _form(8, 16, 32, TWO_LEVEL, _q6_k_codes, _q6_k_scales),
    "IQ4_NL": _form(8, 32, 128, "F16", lambda b: LEVEL_CODES[_nibbles(b[:, 2:])], _half_scale),
    "IQ4_XS": _form(8, 32, 128, TWO_LEVEL, lambda b: LEVEL_CODES[_fields(b[:, 8:], 4, 16)], _iq4_xs_scales),
}
