"""The ctypes declarations of the native library: every structure and function of its C++ sources that Python uses.

The C++ headers named below document the fields; names and order are the same. Imports no framework.
"""

from __future__ import annotations

from collections.abc import Iterable
from ctypes import (
    POINTER,
    Array,
    Structure,
    c_char_p,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_uint32,
    c_void_p,
    sizeof,
)
from typing import Any

# `Format` of matrix.hpp.
FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "lossless": 4}
# `ScaleFormat` of scales.hpp, by the dtype that stores scales and lows; ZERO_POINTS is added where `low` holds bytes.
SCALE_FORMATS = {"float16": 0, "float32": 1, "uint8": 2}
ZERO_POINTS = 4

# Strides (batch, head, token), in elements.
Strides = c_int64 * 3


def strides(*values: int) -> Array[c_int64]:
    """Strides (batch, head, token), in elements, as the structures store them."""
    return Strides(*values)


def _fields(*groups: tuple[Any, str]) -> list[tuple[str, Any]]:
    """Fields from groups of one C type and its names, in the order of the C++ declaration."""
    return [(name, kind) for kind, names in groups for name in names.split()]


# ---------------------------------------------------------------------------- matrices


class Matrix(Structure):
    """`Matrix` of matrix.hpp: a dense or quantised weight and its bias."""

    _fields_ = _fields(
        (c_void_p, "data scale low bias"),
        (c_int64, "outputs inputs"),
        (c_int32, "format group bias_format scale_format"),
    )


class InputRounding(Structure):
    """`InputRounding` of prepare_inputs.hpp: how a product's inputs are rounded to 8 bits."""

    _fields_ = _fields((c_void_p, "channels columns scale low"), (c_int64, "count"))


class ReadPlan(Structure):
    """`ReadPlan` of read_plan.hpp: how products read their weights."""

    _fields_ = _fields((c_int32, "hint distance streams chunks"))


# ---------------------------------------------------------------------------- prompt kernels


class AttentionCall(Structure):
    """`AttentionCall` of attention.hpp, the argument of `mb_attention`."""

    _fields_ = _fields(
        (c_void_p, "q k v out"),
        (Strides, "q_strides k_strides v_strides out_strides"),
        (c_void_p, "alibi_slopes relative valid segments"),
        (c_int64, "valid_stride segments_stride"),
        (c_int64, "batch heads kv_heads queries keys head_dim window relative_stride relative_center"),
        (c_float, "scale softcap"),
        (c_int32, "bf16 causal threads"),
    )


class NormCall(Structure):
    """`NormCall` of prompt_ops.hpp, the argument of `mb_norm`."""

    _fields_ = _fields(
        (c_void_p, "x weight bias out"),
        (c_int64, "rows width"),
        (c_float, "eps"),
        (c_int32, "bf16 rms threads"),
    )


class RopeCall(Structure):
    """`RopeCall` of prompt_ops.hpp, the argument of `mb_rope`."""

    _fields_ = _fields(
        (c_void_p, "x cos sin out"),
        (Strides, "x_strides out_strides angle_strides"),
        (c_int64, "batch heads tokens head_dim rotary_dim"),
        (c_int32, "bf16 threads"),
    )


class ActivationCall(Structure):
    """`ActivationCall` of prompt_ops.hpp, the argument of `mb_activate`."""

    _fields_ = _fields(
        (c_void_p, "x out"),
        (c_int64, "rows width"),
        (c_int32, "kind gated bf16 threads"),
    )


# ---------------------------------------------------------------------------- the decode step


class NormWeights(Structure):
    """`NormWeights` of model.hpp."""

    _fields_ = _fields((c_void_p, "weight bias"), (c_float, "eps"), (c_int32, "kind"))


class LowRank(Structure):
    """`LowRank` of model.hpp: a low-rank adapter of a matrix."""

    _fields_ = _fields((Matrix, "a b"), (c_int64, "first"), (c_float, "scale"), (c_int32, "reserved"))


class Adapters(Structure):
    """`Adapters` of model.hpp: a matrix's adapters."""

    _fields_ = _fields((POINTER(LowRank), "terms"), (c_int64, "count"))


class LayerWeights(Structure):
    """`LayerWeights` of model.hpp."""

    _fields_ = _fields(
        (Matrix, "qkv out up down"),
        (Adapters, "qkv_adapters out_adapters up_adapters down_adapters"),
        (NormWeights, "norm1 norm2 q_norm k_norm"),
        (InputRounding, "qkv_inputs out_inputs up_inputs down_inputs"),
        (c_int64, "window"),
    )


class ModelWeights(Structure):
    """`ModelWeights` of model.hpp."""

    _fields_ = _fields(
        (POINTER(LayerWeights), "blocks"),
        (Matrix, "embed head"),
        (Adapters, "head_adapters"),
        (c_void_p, "position_table inverse_frequencies alibi_slopes"),
        (NormWeights, "embed_norm final_norm"),
        (c_int64, "layers width heads kv_heads head_dim mlp_width position_rows position_offset"),
        (c_int32, "activation gated pre_norm qk_norm_by_head bf16 rotary_dim qkv_by_head"),
        (c_float, "scale clip softcap rotary_scale logit_scale logit_softcap"),
    )


class LayerCache(Structure):
    """`LayerCache` of model.hpp."""

    _fields_ = _fields(
        (c_void_p, "keys values"),
        (Strides, "key_strides value_strides"),
        (c_int64, "index"),
    )


class DecodeStep(Structure):
    """`DecodeStep` of model.hpp."""

    _fields_ = _fields(
        (POINTER(LayerCache), "caches"),
        (c_void_p, "ids type_ids positions valid logits scratch"),
        (c_int64, "scratch_bytes rows tokens past position_stride valid_stride"),
        (c_int32, "threads cache_bf16"),
    )


class PackedForward(Structure):
    """`PackedForward` of packed_forward.hpp, the argument of `mb_forward`."""

    _fields_ = _fields(
        (c_void_p, "ids type_ids positions starts relative out peaks scratch"),
        (c_int64, "scratch_bytes sequences relative_stride relative_center"),
        (c_int32, "causal threads"),
    )


class PagedStep(Structure):
    """`PagedStep` of paged_step.hpp, the argument of `mb_paged_step`."""

    _fields_ = _fields(
        (c_void_p, "ids positions starts past tables wanted embeds embed_rows cache logits scratch"),
        (c_int64, "scratch_bytes sequences outputs table_stride blocks"),
        (c_int32, "threads cache_bf16"),
    )


# ---------------------------------------------------------------------------- the layout


class LayoutEntry(Structure):
    """`LayoutEntry` of abi.hpp: a structure's name and size, or a field's name, offset and size in bytes."""

    _fields_ = _fields((c_char_p, "name"), (c_int64, "offset size"))


# Every structure that Python and the library share.
STRUCTURES: tuple[type[Structure], ...] = (
    *(Matrix, InputRounding, ReadPlan, AttentionCall, NormCall, RopeCall, ActivationCall),
    *(
        NormWeights,
        LowRank,
        Adapters,
        LayerWeights,
        ModelWeights,
        LayerCache,
        DecodeStep,
        PackedForward,
        PagedStep,
    ),
)


def layout() -> dict[str, tuple[int, int]]:
    """(offset, size) in bytes of every structure ("Matrix") and field ("Matrix.data"), as ctypes lays them out."""
    found: dict[str, tuple[int, int]] = {}
    for structure in STRUCTURES:
        found[structure.__name__] = (0, sizeof(structure))
        for name, *_ in getattr(structure, "_fields_", ()):
            field = getattr(structure, name)
            found[f"{structure.__name__}.{name}"] = (field.offset, field.size)
    return found


def library_layout(library: Any) -> dict[str, tuple[int, int]]:
    """The same as `layout`, of an opened library."""
    entries, found = library.mb_layout(), dict[str, tuple[int, int]]()
    for entry in iter(entries):
        if entry.name is None:
            break
        found[entry.name.decode()] = (entry.offset, entry.size)
    return found


def mismatch(library: Any) -> str | None:
    """A description of the first difference between the library's structures and these; None if they are equal."""
    ours, theirs = layout(), library_layout(library)
    for name in [*ours, *(theirs.keys() - ours.keys())]:
        if ours.get(name) != theirs.get(name):
            here, there = (
                "is missing" if found is None else "has {1} bytes at offset {0}".format(*found)
                for found in (ours.get(name), theirs.get(name))
            )
            return f"{name} {there} in the library and {here} in native/abi.py"
    return None


# ---------------------------------------------------------------------------- functions

# The result's type and the arguments' types, by function.
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "mb_sources": (c_char_p, ()),
    "mb_layout": (POINTER(LayoutEntry), ()),
    "mb_level": (c_int, ()),
    "mb_openmp": (c_int, ()),
    "mb_amx": (c_int, ()),
    "mb_linear": (
        c_int,
        (
            *(POINTER(Matrix), c_void_p, c_int32, c_int64, c_int64),
            *(c_void_p, c_int32, c_int64, c_int),
        ),
    ),
    "mb_read_plan": (c_int, (c_int32, c_int64, POINTER(ReadPlan))),
    "mb_set_read_plan": (c_int, (c_int32, c_int64, POINTER(ReadPlan))),
    "mb_product": (c_int, (POINTER(Matrix), c_void_p, c_int64, c_void_p, c_int)),
    "mb_unfold": (c_int, (POINTER(Matrix), c_void_p, c_int)),
    "mb_read": (c_int, (c_void_p, c_int64, c_int, POINTER(c_uint32))),
    "mb_attention": (c_int, (POINTER(AttentionCall),)),
    "mb_norm": (c_int, (POINTER(NormCall),)),
    "mb_rope": (c_int, (POINTER(RopeCall),)),
    "mb_activate": (c_int, (POINTER(ActivationCall),)),
    "mb_step": (c_int64, (POINTER(ModelWeights), POINTER(DecodeStep))),
    "mb_forward": (c_int64, (POINTER(ModelWeights), POINTER(PackedForward))),
    "mb_paged_step": (c_int64, (POINTER(ModelWeights), POINTER(PagedStep))),
    "mb_block_size": (c_int64, (POINTER(ModelWeights),)),
    "mb_block_tokens": (c_int64, ()),
}


def bind(library: Any, names: Iterable[str]) -> None:
    """Set the result and argument types of functions of an opened library. AttributeError if it lacks one."""
    for name in names:
        function = getattr(library, name)
        function.restype, function.argtypes = SIGNATURES[name]
