"""The C structures of attention.hpp and prompt.hpp, where their fields are explained."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any

_STEPS = c_int64 * 3


def _fields(text: str) -> list[tuple[str, Any]]:
    """Fields from lines of a C type and its names."""
    types = {"pointer": c_void_p, "int64": c_int64, "int32": c_int32, "float": c_float, "steps": _STEPS}
    lines = [line.split() for line in text.strip().splitlines()]
    return [(name, types[kind]) for kind, *names in lines for name in names]


class Attention(Structure):
    """`mb_attention`."""

    _fields_ = _fields("""
        pointer q k v out
        steps q_stride k_stride v_stride out_stride
        pointer slopes valid segments
        int64 valid_stride segments_stride
        int64 batch heads groups queries keys dim
        int64 window
        float scale softcap
        int32 bf16 causal threads
    """)


class Norm(Structure):
    """`mb_norm`."""

    _fields_ = _fields("""
        pointer x weight bias out
        int64 rows width
        float eps
        int32 bf16 rms threads
    """)


class Turn(Structure):
    """`mb_turn`."""

    _fields_ = _fields("""
        pointer x cos sin out
        steps x_stride out_stride angle_stride
        int64 batch heads tokens dim turned
        int32 bf16 threads
    """)


class Activate(Structure):
    """`mb_activate`."""

    _fields_ = _fields("""
        pointer x out
        int64 rows width
        int32 kind gated bf16 threads
    """)


def strides(*steps: int) -> Any:
    """Steps of batch, head and token, in elements."""
    return _STEPS(*steps)
