"""Constants of position encodings, in NumPy, shared by the backends: RoPE frequencies, relative position buckets."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from monoblock.spec import ArchSpec, Buckets, Learned, RopeScaling, Rotary

Floats = np.ndarray[Any, np.dtype[Any]]
Ints = np.ndarray[Any, np.dtype[Any]]


def inverse_frequencies(rotary: Rotary, length: int = 0) -> tuple[Floats, float]:
    """Rotary frequencies in radians per token, float32 (dim / 2,), and the factor on cos and sin.

    For dynamic scaling, the frequencies depend on the sequence length `length`; 0 means unscaled.

    Sources: RoPE arXiv:2104.09864; linear arXiv:2306.15595; dynamic and yarn arXiv:2309.00071; llama3 as in
    Meta's code for Llama 3.1.
    """
    theta, scaling, factor = rotary.theta, rotary.scaling, 1.0
    if scaling is not None and scaling.kind == "dynamic":
        ratio = max(length, scaling.original_length) / scaling.original_length
        scale = scaling.factor * ratio - (scaling.factor - 1)
        theta *= scale ** (rotary.dim / (rotary.dim - 2))
    found: Floats = 1.0 / theta ** steps(rotary)
    if scaling is not None and scaling.kind != "dynamic":
        found, factor = _SCALINGS[scaling.kind](rotary, scaling, found)
    return found.astype(np.float32), factor


def steps(rotary: Rotary) -> Floats:
    """The exponents 2i / dim of theta, float64 (dim / 2,)."""
    return np.arange(0, rotary.dim, 2, dtype=np.float64) / rotary.dim


def is_dynamic(rotary: Rotary | None) -> bool:
    """Whether the angles depend on the sequence length (dynamic scaling)."""
    return rotary is not None and rotary.scaling is not None and rotary.scaling.kind == "dynamic"


def has_positions(spec: ArchSpec) -> bool:
    """Whether position ids affect this model."""
    return any(isinstance(p, Learned | Rotary) for p in spec.positions)


def _linear(_: Rotary, scaling: RopeScaling, inverse: Floats) -> tuple[Floats, float]:
    return inverse / scaling.factor, 1.0


def _llama3(_: Rotary, scaling: RopeScaling, inverse: Floats) -> tuple[Floats, float]:
    rotations = scaling.original_length * inverse / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((rotations - low) / (high - low), 0, 1)
    return inverse / scaling.factor * (1 - smooth) + inverse * smooth, 1.0


def _yarn(rotary: Rotary, scaling: RopeScaling, inverse: Floats) -> tuple[Floats, float]:
    def channel(rotations: float) -> float:
        log = math.log(scaling.original_length / (rotations * 2 * math.pi))
        return rotary.dim * log / (2 * math.log(rotary.theta))

    low = max(math.floor(channel(scaling.beta_fast)), 0)
    high = min(math.ceil(channel(scaling.beta_slow)), rotary.dim - 1)
    ramp = (np.arange(rotary.dim // 2, dtype=np.float64) - low) / max(high - low, 1e-3)
    kept = 1 - np.clip(ramp, 0, 1)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return inverse / scaling.factor * (1 - kept) + inverse * kept, factor


_SCALINGS = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}


def relative_position_bucket(distance: Ints, layout: Buckets) -> Ints:
    """T5's bidirectional bucket of each distance (key - query), int64 (arXiv:1910.10683). Half of the buckets are for
    past keys, half for future ones; in each half, one bucket per small distance, then logarithmic up to
    `max_distance`."""
    half = layout.count // 2
    exact = half // 2
    far = np.abs(distance)
    # In fp32, as in training: at the boundary between two buckets, rounding decides.
    grown = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact))
    grown = grown / np.float32(math.log(layout.max_distance / exact)) * np.float32(half - exact)
    grown = np.minimum(exact + grown.astype(np.int64), half - 1)
    return np.where(distance > 0, half, 0) + np.where(far < exact, far, grown)


@functools.lru_cache(maxsize=16)
def past_position_buckets(count: int, max_distance: int) -> Ints:
    """The buckets of past distances 0 to `max_distance`, int32 (max_distance + 1,); larger distances have the last one.

    A table, because the logarithm of compilers may round a distance at a bucket boundary either way.
    """
    layout = Buckets(count=count, max_distance=max_distance)
    return relative_position_bucket(-np.arange(max_distance + 1), layout).astype(np.int32)
