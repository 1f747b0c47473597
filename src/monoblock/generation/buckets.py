"""Lengths rounded up, so that what is compiled for one length serves its neighbours."""

from __future__ import annotations

SMALLEST = 16


def bucket(length: int) -> int:
    """The smallest of 16, 32, 64, 96, 128, 192, 256, 384, ... that is not below `length`.

    Powers of two, and from 64 on half-way between them: less than half as much again is computed in vain there.
    """
    power = SMALLEST
    while power < length:
        power *= 2
    between = power // 4 * 3
    return between if between >= max(length, 96) else power
