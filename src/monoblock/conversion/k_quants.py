"""The encoder of Q4_K, which the `gguf` package lacks.

A block of 256 weights of a row is 8 groups of 32: weight = d * scale * code - dmin * low, with codes of 4 bits, scales
and lows of 6 bits, and d and dmin in fp16. Layout: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
(block_q4_K): d, dmin, 12 bytes of scales and lows, 128 bytes of codes, of which each 32 hold the codes of a group in
their low halves and those of the next one in their high halves.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

BLOCK, GROUP, BYTES = 256, 32, 144
_CODES, _FACTORS = 15, 63
# Numbers of steps from the lowest to the highest weight that are tried: fewer clip outliers, more leave codes unused.
_STEPS = np.linspace(13.0, 16.0, 11, dtype=np.float32)


def encode_q4_k(weights: Array) -> Array:
    """Rows of float32 weights (rows, inputs), inputs a multiple of 256, as Q4_K (rows, inputs / 256 * 144) bytes."""
    rows, inputs = weights.shape
    x = np.ascontiguousarray(weights, np.float32).reshape(-1, BLOCK // GROUP, GROUP)
    scale, low = _fitted(x)
    d, scale6 = _six_bits(scale)
    dmin, low6 = _six_bits(low)
    step = d * scale6
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
    codes = np.rint((x + (dmin * low6)[..., None]) * inverse[..., None])
    codes = np.clip(codes, 0, _CODES).astype(np.uint8)
    made = np.empty((len(x), BYTES), np.uint8)
    made[:, 0:2] = d.astype("<f2").view(np.uint8)
    made[:, 2:4] = dmin.astype("<f2").view(np.uint8)
    a, b = scale6.astype(np.uint8), low6.astype(np.uint8)
    made[:, 4:8] = a[:, :4] | a[:, 4:] >> 4 << 6
    made[:, 8:12] = b[:, :4] | b[:, 4:] >> 4 << 6
    made[:, 12:16] = a[:, 4:] & 15 | (b[:, 4:] & 15) << 4
    made[:, 16:] = (codes[:, 0::2] | codes[:, 1::2] << 4).reshape(len(x), -1)
    return made.reshape(rows, inputs // BLOCK * BYTES)


def _six_bits(values: Array) -> tuple[Array, Array]:
    """Positive numbers of 8 groups (n, 8) as a number of fp16 (n, 1) times integers from 0 to 63."""
    whole = (values.max(-1, keepdims=True) / _FACTORS).astype(np.float16).astype(np.float32)
    inverse = np.divide(1, whole, out=np.zeros_like(whole), where=whole > 0)
    return whole, np.clip(np.rint(values * inverse), 0, _FACTORS)


def _fitted(x: Array) -> tuple[Array, Array]:
    """Scale and low (n, 8) of each group (n, 8, 32), both at least 0, with the least weighted square error of
    scale * code - low: for several numbers of steps, the codes, and the line through them by least squares. Large
    weights count more, since inputs that they multiply tend to matter."""
    importance: Array = np.sqrt(np.mean(np.square(x), -1, keepdims=True)) + np.abs(x)
    lowest: Array = np.minimum(x.min(-1), 0)
    span: Array = x.max(-1) - lowest
    best: Array = np.full(span.shape, np.inf, np.float32)
    scale: Array = span / _CODES
    low: Array = -lowest
    total, sum_x = importance.sum(-1), (importance * x).sum(-1)
    for steps in _STEPS:
        inverse = np.divide(steps, span, out=np.zeros_like(span), where=span > 0)
        codes = np.clip(np.rint((x - lowest[..., None]) * inverse[..., None]), 0, _CODES)
        weighted = importance * codes
        sum_c, sum_cc, sum_cx = weighted.sum(-1), (weighted * codes).sum(-1), (weighted * x).sum(-1)
        determinant = total * sum_cc - sum_c * sum_c
        valid = determinant > 0
        a = np.divide(total * sum_cx - sum_c * sum_x, determinant, out=np.zeros_like(span), where=valid)
        b = np.divide(sum_cc * sum_x - sum_c * sum_cx, determinant, out=np.zeros_like(span), where=valid)
        # A low above 0 has no form: then the line through 0.
        through = np.divide(sum_cx, sum_cc, out=np.zeros_like(span), where=sum_cc > 0)
        a, b = np.where(b > 0, through, a), np.minimum(b, 0)
        error = (importance * np.square(a[..., None] * codes + b[..., None] - x)).sum(-1)
        better = valid & (a > 0) & (error < best)
        best, scale, low = (
            np.where(better, error, best),
            np.where(better, a, scale),
            np.where(better, -b, low),
        )
    return scale, low
