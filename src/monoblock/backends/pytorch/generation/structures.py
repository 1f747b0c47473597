"""A model's weights, and a step's inputs, as the structures of native/model.hpp, which explains their fields."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from monoblock import native
from monoblock.backends.pytorch.kernels.linear import FORMATS, PACKED
from monoblock.backends.pytorch.layers import Conv1D
from monoblock.positions import inverse_frequencies
from monoblock.spec import ACTIVATIONS, Alibi, ArchSpec, Learned, Rotary

if TYPE_CHECKING:
    from monoblock.backends.pytorch.pretrained import PreTrainedModel


class Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("eps", c_float), ("kind", c_int32)]


class Layer(Structure):
    _fields_ = [
        *((name, native.Matrix) for name in ("qkv", "out", "up", "down")),
        *((name, Norm) for name in ("norm1", "norm2", "q_norm", "k_norm")),
        ("window", c_int64),
    ]


class Model(Structure):
    _fields_ = [
        ("blocks", POINTER(Layer)),
        ("embed", native.Matrix),
        ("head", native.Matrix),
        *((name, c_void_p) for name in ("positions", "turns", "slopes")),
        ("embed_norm", Norm),
        ("final_norm", Norm),
        *(
            (name, c_int64)
            for name in ("layers", "width", "heads", "groups", "dim", "inner", "size", "offset")
        ),
        *((name, c_int32) for name in ("activation", "gated", "before", "by_head", "bf16", "rotary")),
        *(
            (name, c_float)
            for name in ("scale", "clip", "softcap", "turn_scale", "logit_scale", "logit_softcap")
        ),
    ]


class Slot(Structure):
    _fields_ = [
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_steps", c_int64 * 3),
        ("value_steps", c_int64 * 3),
        ("place", c_int64),
    ]


class Step(Structure):
    _fields_ = [
        ("slots", POINTER(Slot)),
        *((name, c_void_p) for name in ("ids", "types", "positions", "valid", "logits", "scratch")),
        *((name, c_int64) for name in ("scratch_bytes", "rows", "tokens", "past")),
        *((name, c_int64) for name in ("position_step", "valid_step")),
        *((name, c_int32) for name in ("threads", "cache_bf16")),
    ]


def common_dtype(model: PreTrainedModel) -> torch.dtype:
    """The type of what is never packed."""
    name = model.place("norm1", 0)
    return model.get_submodule(name).get_parameter("weight").dtype


class Weights:
    """A model's weights as the library's structures, which point to where they lie."""

    def __init__(self, model: PreTrainedModel) -> None:
        spec = model.spec
        self.bf16 = common_dtype(model) == torch.bfloat16
        self.layers = spec.layers
        head: Any = model.get_output_embeddings()
        self.vocab = int(head.out_features)
        self._blocks = (Layer * spec.layers)(*(_layer(model, i) for i in range(spec.layers)))
        self._arrays = _constants(spec)
        numbers = _numbers(spec) | {
            "by_head": spec.attention.qk_norm is not None and spec.attention.qk_norm.span == "head",
            "bf16": self.bf16,
        }
        learned = model.at("pos_embed") if spec.position(Learned) else None
        self.struct = Model(
            blocks=self._blocks,
            embed=_matrix(model.get_input_embeddings()),
            head=_matrix(head),
            positions=None if learned is None else learned.weight.data_ptr(),
            embed_norm=_norm(model.at("embed_norm")),
            final_norm=_norm(model.at("final_norm")),
            **{name: array.ctypes.data for name, array in self._arrays.items()},
            **numbers,
        )


def _layer(model: PreTrainedModel, i: int) -> Layer:
    return Layer(
        qkv=_joint(model, i, ("q", "k", "v"), ("qkv", "qkv_by_head")),
        out=_matrix(model.at("out", i)),
        up=_joint(model, i, ("gate", "up"), ("up",)),
        down=_matrix(model.at("down", i)),
        norm1=_norm(model.at("norm1", i)),
        norm2=_norm(model.at("norm2", i)),
        q_norm=_norm(model.at("q_norm", i)),
        k_norm=_norm(model.at("k_norm", i)),
        window=model.spec.windows[i] or 0,
    )


def _joint(model: PreTrainedModel, i: int, group: tuple[str, ...], single: tuple[str, ...]) -> native.Matrix:
    """A group's matrices as one, or the one module that holds them all."""
    members = [model.at(role, i) for role in group]
    if any(member is None for member in members):
        return _matrix(next(m for role in single if (m := model.at(role, i)) is not None))
    matrices = [_matrix(member) for member in members]
    matrices[0].outputs = sum(matrix.outputs for matrix in matrices)
    return matrices[0]


def _numbers(spec: ArchSpec) -> dict[str, Any]:
    att, rotary, learned = spec.attention, spec.position(Rotary), spec.position(Learned)
    return {
        "layers": spec.layers,
        "width": spec.width,
        "heads": att.heads,
        "groups": att.kv_heads,
        "dim": att.head_dim,
        "inner": spec.mlp.width,
        "size": learned.size if learned else 0,
        "offset": learned.offset if learned else 0,
        "activation": ACTIVATIONS.index(spec.mlp.act),
        "gated": spec.mlp.gated,
        "before": spec.placement == "pre",
        "rotary": rotary.dim if rotary else 0,
        "scale": att.scale,
        "clip": att.clip or 0,
        "softcap": att.softcap or 0,
        "turn_scale": inverse_frequencies(rotary)[1] if rotary else 1,
        "logit_scale": spec.logit_scale,
        "logit_softcap": spec.logit_softcap or 0,
    }


def _constants(spec: ArchSpec) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays that belong to no module."""
    made: dict[str, np.ndarray[Any, Any]] = {}
    if rotary := spec.position(Rotary):
        made["turns"] = np.ascontiguousarray(inverse_frequencies(rotary)[0], np.float32)
    if alibi := spec.position(Alibi):
        made["slopes"] = np.array(alibi.slopes(spec.attention.heads), np.float32)
    return made


def _matrix(module: Any) -> native.Matrix:
    bias = getattr(module, "bias", None)
    if hasattr(module, "codes"):
        parts = {"data": module.codes, "scale": module.scale, "low": module.low, "bias": bias}
        return native.Matrix(
            **{name: None if part is None else part.data_ptr() for name, part in parts.items()},
            outputs=module.rows,
            inputs=module.columns,
            format=PACKED[module.bits],
            group=module.group,
            bias_format=0 if bias is None else FORMATS[bias.dtype],
        )
    outputs, inputs = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
    return native.Matrix(
        data=module.weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        outputs=outputs,
        inputs=inputs,
        format=FORMATS[module.weight.dtype],
        bias_format=0 if bias is None else FORMATS[bias.dtype],
    )


def _norm(module: Any) -> Norm:
    match module:
        case nn.LayerNorm():
            bias = None if module.bias is None else module.bias.data_ptr()
            return Norm(weight=module.weight.data_ptr(), bias=bias, eps=module.eps, kind=1)
        case nn.RMSNorm():
            return Norm(weight=module.weight.data_ptr(), eps=module.eps, kind=2)
        case _:
            return Norm()
