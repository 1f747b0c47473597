"""Lengths rounded up to buckets, so that programs are compiled for few shapes."""

from __future__ import annotations

SMALLEST = 16


def bucket(length: int) -> int:
    """The smallest of 16, 32, 64, 96, 128, 192, 256, 384, ... that is at least `length`.

    Powers of two and, from 64 on, the midpoints between them: at most half of the computation is padding there.
    """
    power = SMALLEST
    while power < length:
        power *= 2
    between = power // 4 * 3
    return between if between >= max(length, 96) else power
