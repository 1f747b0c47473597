"""Comparison of arrays of any framework within a bound, and a record of the largest error of each comparison."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

EPS = 2.0**-23  # float32: the step from 1 to the next number

# Name of a comparison -> the error with the largest ratio to its bound, and that bound.
WORST: dict[str, tuple[float, float]] = {}


def array(x: Any) -> np.ndarray:
    """An array of any framework as NumPy float64."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().double().numpy()
    return np.asarray(x, np.float64)


def largest(out: Any) -> float:
    """The largest magnitude in an array, a sequence of arrays, or a model output without losses and caches."""
    if out is None:
        return 0.0
    if hasattr(out, "keys"):
        others = ("loss", "mc_loss", "past_key_values")
        return max((largest(out[key]) for key in out.keys() if key not in others), default=0.0)  # noqa: SIM118
    if isinstance(out, (tuple, list)):
        return max(map(largest, out), default=0.0)
    return float(np.abs(array(out)).max(initial=0.0))


def rounding(spec: Any, out: Any) -> float:
    """Bound on the difference of two float32 forward passes of a model that sum in different orders.

    `spec` is the ArchSpec; `out` the output with hidden states, whose largest magnitude is the scale.

    The partial sums of n products are rounded at random, each by 0.2 eps (rms) of itself: in all by 0.15 sqrt(n) eps
    of the sum's rms, and two orders differ by 0.2 sqrt(n) eps. The largest of 10^4 such differences is 4 times that,
    and the largest value is 3 to 4 times the rms: so a product of matrices adds at most sqrt(n) eps / 4 of the
    largest value. A block has six in a row (qkv, scores, values, out, up, down), which makes 1.5; 2 with its norms
    and residual sums. These are taken to point the same way: independent errors would grow with the root of their
    number, but later blocks amplify those of earlier ones, most where attention's scores are large. An attention
    weight changes by at most half the change of its score. n is the longest sum.
    """
    return 2 * spec.layers * math.sqrt(max(spec.width, spec.mlp.width)) * EPS * largest(out)


def assert_close(what: str, ours: Any, expected: Any, bound: float, where: Any = None) -> None:
    """|ours - expected| <= bound, at the (batch, tokens) positions where `where` is not 0."""
    ours, expected = array(ours), array(expected)
    assert ours.shape == expected.shape, f"{what}: {ours.shape} against {expected.shape}"
    if where is not None:
        at = array(where) != 0
        ours, expected = ours[at], expected[at]
    assert np.isfinite(ours).all(), f"{what}: not finite"
    if ours.size == 0:
        return
    error = float(np.abs(ours - expected).max())
    nearest, allowed = WORST.get(what, (0.0, 1.0))
    if error * allowed > nearest * bound:
        WORST[what] = (error, bound)
    assert error <= bound, f"{what}: differs by {error:.2e}, more than {bound:.0e}"
