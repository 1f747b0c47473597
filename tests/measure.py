"""Comparing arrays of any framework with a bound, and keeping the largest difference that was met."""

from __future__ import annotations

from typing import Any

import numpy as np

# What was compared -> the largest difference, and its bound.
WORST: dict[str, tuple[float, float]] = {}


def array(x: Any) -> np.ndarray:
    """As NumPy float64, whatever it comes from."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().double().numpy()
    return np.asarray(x, np.float64)


def assert_close(what: str, ours: Any, expected: Any, bound: float, where: Any = None) -> None:
    """|ours - expected| <= bound, at the (batch, tokens) places where `where` is not 0."""
    ours, expected = array(ours), array(expected)
    assert ours.shape == expected.shape, f"{what}: {ours.shape} against {expected.shape}"
    if where is not None:
        at = array(where) != 0
        ours, expected = ours[at], expected[at]
    assert np.isfinite(ours).all(), f"{what}: not finite"
    if ours.size == 0:
        return
    error = float(np.abs(ours - expected).max())
    if error > WORST.get(what, (0.0, 0.0))[0]:
        WORST[what] = (error, bound)
    assert error <= bound, f"{what}: differs by {error:.2e}, more than {bound:.0e}"
