"""A stand-in for peft's LoRA layer: a module with its fields."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Lora(nn.Module):
    """The base layer's output and, for each adapter, scaling * B A x."""

    disable_adapters = merged = False

    def __init__(self, base_layer: Any, ranks: dict[str, int], dtype: torch.dtype) -> None:
        super().__init__()
        sizes = base_layer.in_features, base_layer.out_features
        self.base_layer = base_layer
        self.active_adapters = list(ranks)
        self.lora_A = nn.ModuleDict({n: nn.Linear(sizes[0], r, bias=False) for n, r in ranks.items()})
        self.lora_B = nn.ModuleDict({n: nn.Linear(r, sizes[1], bias=False) for n, r in ranks.items()})
        self.lora_A.to(dtype)
        self.lora_B.to(dtype)
        self.lora_dropout = nn.ModuleDict({name: nn.Identity() for name in ranks})
        self.scaling = {name: 0.5 + rank for name, rank in ranks.items()}
        self.lora_variant: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        for name in self.active_adapters:
            low = self.lora_A[name](x.to(self.lora_A[name].weight.dtype))
            y = y + self.lora_B[name](low) * self.scaling[name]
        return y.to(x.dtype)


Lora: Any = type("Linear", (_Lora,), {"__module__": "peft.tuners.lora.layer"})


def adapt(model: Any, names: list[str], ranks: dict[str, int], dtype: torch.dtype = torch.float32) -> None:
    for module in list(model.modules()):
        for name in names:
            if isinstance(getattr(module, name, None), nn.Linear):
                setattr(module, name, Lora(getattr(module, name), ranks, dtype).eval())
