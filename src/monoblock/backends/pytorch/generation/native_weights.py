"""A model's weights as the ctypes structures of native/abi.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from monoblock.backends.pytorch.base import ModelBase
from monoblock.backends.pytorch.kernels import low_rank
from monoblock.backends.pytorch.kernels.linear import native_matrix
from monoblock.backends.pytorch.layers import Conv1D
from monoblock.backends.pytorch.quantization.modules import QuantizedMatrix
from monoblock.native.abi import Adapters, LayerWeights, LowRank, Matrix, ModelWeights, NormWeights
from monoblock.positions import inverse_frequencies
from monoblock.spec import ACTIVATIONS, Alibi, ArchSpec, Learned, Rotary


def common_dtype(model: ModelBase) -> torch.dtype:
    """The dtype of the weights that are never quantised."""
    name = model.module_path("norm1", 0)
    return model.get_submodule(name).get_parameter("weight").dtype


class NativeWeights:
    """A model's weights as the library's structures, which hold pointers to the tensors' memory."""

    def __init__(self, model: ModelBase) -> None:
        spec = model.spec
        self.bf16 = common_dtype(model) == torch.bfloat16
        self.layers = spec.layers
        head: Any = model.get_output_embeddings()
        self.vocab = int(low_rank.base(head).out_features)
        self._blocks = (LayerWeights * spec.layers)(*(_layer(model, i) for i in range(spec.layers)))
        self._arrays = _constants(spec)
        numbers = _numbers(spec) | {
            "qk_norm_by_head": spec.attention.qk_norm is not None and spec.attention.qk_norm.span == "head",
            "qkv_by_head": "qkv_by_head" in model.module_paths,
            "bf16": self.bf16,
        }
        learned = model.at("pos_embed") if spec.position(Learned) else None
        self.struct = ModelWeights(
            blocks=self._blocks,
            embed=_matrix(model.get_input_embeddings()),
            head=_matrix(head),
            head_adapters=_adapters([head]),
            position_table=None if learned is None else learned.weight.data_ptr(),
            embed_norm=_norm(model.at("embed_norm")),
            final_norm=_norm(model.at("final_norm")),
            **{name: array.ctypes.data for name, array in self._arrays.items()},
            **numbers,
        )


def _layer(model: ModelBase, i: int) -> LayerWeights:
    qkv = _members(model, i, ("q", "k", "v"), ("qkv", "qkv_by_head"))
    out, down = [model.at("out", i)], [model.at("down", i)]
    up = _members(model, i, ("gate", "up"), ("up",))
    return LayerWeights(
        qkv=_joint(qkv),
        out=_joint(out),
        up=_joint(up),
        down=_joint(down),
        qkv_adapters=_adapters(qkv),
        out_adapters=_adapters(out),
        up_adapters=_adapters(up),
        down_adapters=_adapters(down),
        norm1=_norm(model.at("norm1", i)),
        norm2=_norm(model.at("norm2", i)),
        q_norm=_norm(model.at("q_norm", i)),
        k_norm=_norm(model.at("k_norm", i)),
        window=model.spec.windows[i] or 0,
    )


def _members(model: ModelBase, i: int, group: tuple[str, ...], single: tuple[str, ...]) -> list[Any]:
    """The modules of a group, or the single module that has their fused matrix."""
    members = [model.at(role, i) for role in group]
    if any(member is None for member in members):
        return [next(m for role in single if (m := model.at(role, i)) is not None)]
    return members


def _joint(members: list[Any]) -> Matrix:
    """Adjacent matrices as one."""
    matrices = [_matrix(member) for member in members]
    matrices[0].outputs = sum(matrix.outputs for matrix in matrices)
    return matrices[0]


def _adapters(members: list[Any]) -> Adapters:
    """The LoRA adapters of adjacent matrices that are used as one."""
    found: list[LowRank] = []
    first = 0
    for member in members:
        found += [
            LowRank(
                a=native_matrix(term.a, None), b=native_matrix(term.b, None), first=first, scale=term.scale
            )
            for term in low_rank.terms(member)
        ]
        first += _matrix(member).outputs
    return Adapters(terms=(LowRank * len(found))(*found) if found else None, count=len(found))


def _numbers(spec: ArchSpec) -> dict[str, Any]:
    att, rotary, learned = spec.attention, spec.position(Rotary), spec.position(Learned)
    return {
        "layers": spec.layers,
        "width": spec.width,
        "heads": att.heads,
        "kv_heads": att.kv_heads,
        "head_dim": att.head_dim,
        "mlp_width": spec.mlp.width,
        "position_rows": learned.size if learned else 0,
        "position_offset": learned.offset if learned else 0,
        "activation": ACTIVATIONS.index(spec.mlp.act),
        "gated": spec.mlp.gated,
        "pre_norm": spec.placement == "pre",
        "rotary_dim": rotary.dim if rotary else 0,
        "scale": att.scale,
        "clip": att.clip or 0,
        "softcap": att.softcap or 0,
        "rotary_scale": inverse_frequencies(rotary)[1] if rotary else 1,
        "logit_scale": spec.logit_scale,
        "logit_softcap": spec.logit_softcap or 0,
    }


def _constants(spec: ArchSpec) -> dict[str, np.ndarray[Any, Any]]:
    """The constant arrays that belong to no module."""
    made: dict[str, np.ndarray[Any, Any]] = {}
    if rotary := spec.position(Rotary):
        made["inverse_frequencies"] = np.ascontiguousarray(inverse_frequencies(rotary)[0], np.float32)
    if alibi := spec.position(Alibi):
        made["alibi_slopes"] = np.array(alibi.slopes(spec.attention.heads), np.float32)
    return made


def _matrix(module: Any) -> Matrix:
    module = low_rank.base(module)
    bias = getattr(module, "bias", None)
    if isinstance(module, QuantizedMatrix):
        return native_matrix(module.quantized, bias)
    return native_matrix(module.weight.t() if isinstance(module, Conv1D) else module.weight, bias)


def _norm(module: Any) -> NormWeights:
    match module:
        case nn.LayerNorm():
            bias = None if module.bias is None else module.bias.data_ptr()
            return NormWeights(weight=module.weight.data_ptr(), bias=bias, eps=module.eps, kind=1)
        case nn.RMSNorm():
            return NormWeights(weight=module.weight.data_ptr(), eps=module.eps, kind=2)
        case _:
            return NormWeights()
