"""LoRA adapters (peft's `lora.Linear` modules) as data: the matrix below them and the low-rank terms they add to it.

    y = W x + sum over the active adapters of scale * B A x        (Hu et al., arXiv 2106.09685)

The modules are recognised by class name, so that peft is not imported.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from monoblock.backends.pytorch.kernels import dispatch

DTYPES = (torch.float32, torch.bfloat16)


class LowRankUpdate(NamedTuple):
    """One adapter: `a` (rank, inputs), `b` (outputs, rank)."""

    a: Tensor
    b: Tensor
    scale: float


# The attributes of the module that are read. Older versions of peft name them differently.
FIELDS = (
    "base_layer",
    "lora_A",
    "lora_B",
    "lora_dropout",
    "lora_variant",
    "scaling",
    "disable_adapters",
    "merged",
)


def is_lora(module: Any) -> bool:
    """Whether this is peft's LoRA layer around a matrix."""
    kind = type(module)
    named = kind.__name__ == "Linear" and kind.__module__ == "peft.tuners.lora.layer"
    return named and all(hasattr(module, name) for name in FIELDS)


def base(module: Any) -> Any:
    """The module inside a LoRA layer; the module itself if it is none."""
    return module.base_layer if is_lora(module) else module


def active(module: Any) -> list[str]:
    """The names of the active adapters of a LoRA module."""
    if module.disable_adapters or module.merged:
        return []
    return [name for name in module.active_adapters if name in module.lora_A]


def terms(module: Any) -> list[LowRankUpdate]:
    """The low-rank terms of a module's active adapters."""
    if not is_lora(module):
        return []
    return [
        LowRankUpdate(module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name]))
        for name in active(module)
    ]


def obstacle(module: Any) -> str | None:
    """Why a LoRA module cannot be computed as matrix plus `terms` by a native kernel; None if it can."""
    if module.disable_adapters and module.merged:
        return "LoRA adapter (peft) that is merged and disabled"
    names = active(module)
    for name in names:
        pair = (module.lora_A[name], module.lora_B[name])
        if name in module.lora_variant:
            return f"LoRA variant {type(module.lora_variant[name]).__name__} (peft)"
        if any(type(half) is not nn.Linear for half in pair):
            return "LoRA adapter (peft) of other modules than Linear"
        dropout = module.lora_dropout[name]
        if not isinstance(dropout, nn.Identity) and dropout.training and not module.base_layer.training:
            return "LoRA adapter (peft) with dropout in training mode"
        if any(half.bias is not None for half in pair):
            return "LoRA adapter (peft) with a bias"
        for half in pair:
            weight = half.weight
            plain = dispatch.native(weight, gradient=True) and weight.is_contiguous()
            if not plain or weight.dtype not in DTYPES:
                return f"LoRA adapter (peft) whose weights are {weight.dtype} on {weight.device.type}"
    if len({module.lora_A[name].weight.dtype for name in names}) > 1:
        return "LoRA adapters (peft) of several dtypes on one matrix"
    return None
