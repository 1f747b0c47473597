"""Which parameters AdamW's weight decay applies to, for every framework."""

from __future__ import annotations


def decays(name: str, axes: int) -> bool:
    """Whether weight decay applies to a parameter with this number of axes: to matrices and tables, not to norms,
    vectors and biases (tables of position biases included)."""
    return axes >= 2 and "bias" not in name
