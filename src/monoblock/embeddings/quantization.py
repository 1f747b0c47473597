"""Quantised embeddings: `quantize_embeddings`."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from monoblock.embeddings.arrays import host

log = logging.getLogger("monoblock")

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
FEW = 100  # texts, below which ranges of their own values are unreliable


def quantize_embeddings(
    embeddings: Any, precision: str, ranges: Any = None, calibration_embeddings: Any = None
) -> np.ndarray:
    """Embeddings [n, width] in a smaller type.

    "int8" and "uint8": 256 steps between the minimum and the maximum of each channel, which are `ranges` [2, width],
    or those of `calibration_embeddings`, or those of the embeddings themselves (with a warning for fewer than 100).
    "binary" and "ubinary": one bit per channel, 1 for positive values, 8 channels per byte, [n, ceil(width / 8)];
    "binary" subtracts 128 and is int8. Accepts NumPy arrays, tensors, and lists of either. ValueError: another
    precision, embeddings that are integers, or ranges of a single embedding.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(map(repr, PRECISIONS))}")
    values = _values(embeddings)
    if values.dtype.kind != "f":
        raise ValueError(f"embeddings are {values.dtype}; expected floating-point numbers")
    if precision == "float32":
        return values.astype(np.float32)
    if precision in ("int8", "uint8"):
        if ranges is None:
            source = values if calibration_embeddings is None else _values(calibration_embeddings)
            if len(source) < 2:
                raise ValueError(
                    f"{precision}: one embedding has no range of values; pass ranges= or calibration_embeddings= with "
                    "more to quantize_embeddings"
                )
            if calibration_embeddings is None and len(values) < FEW:
                log.warning(
                    "%s: the ranges of each channel are those of %d embeddings; pass ranges= or "
                    "calibration_embeddings= with more to quantize_embeddings",
                    precision,
                    len(values),
                )
            ranges = np.stack([source.min(axis=0), source.max(axis=0)])
        ranges = np.asarray(ranges)
        steps = (ranges[1] - ranges[0]) / 255
        steps = np.where(steps == 0, 1, steps)
        codes = np.clip(np.floor((values - ranges[0]) / steps), 0, 255)
        return codes.astype(np.uint8) if precision == "uint8" else (codes - 128).astype(np.int8)
    bits = np.packbits(values > 0, axis=-1)
    return bits if precision == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)


def _values(embeddings: Any) -> np.ndarray:
    if isinstance(embeddings, list | tuple):
        return (
            np.stack([_values(one) for one in embeddings])
            if len(embeddings)
            else np.zeros((0, 0), np.float32)
        )
    if isinstance(embeddings, np.ndarray | np.generic):
        return np.asarray(embeddings)
    if hasattr(embeddings, "detach") and not embeddings.is_floating_point():
        return embeddings.cpu().numpy()
    if hasattr(embeddings, "detach"):
        return host(embeddings)
    return np.asarray(embeddings)
