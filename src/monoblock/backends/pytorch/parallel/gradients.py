"""The norm of the gradients of a sharded model, of which each process has a part."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from monoblock.backends.pytorch.parallel.files import named_shards
from monoblock.backends.pytorch.parallel.groups import TensorGroup


def clip(model: Any, group: TensorGroup, max_norm: float) -> Tensor:
    """Scale all gradients so that their norm is at most `max_norm`; returns their norm before, the same in all
    processes. Replicated parameters are counted once."""
    sharded = {id(model.get_parameter(name)) for name, shard in named_shards(model) if shard.dim is not None}
    squares = torch.zeros(
        2, dtype=torch.float32, device=group.device
    )  # of sharded and of replicated parameters
    gradients: list[Tensor] = []
    divided = False
    for parameter in model.parameters():
        if (gradient := parameter.grad) is None:
            continue
        if hasattr(gradient, "to_local"):  # FSDP2 divides it over the axis "data"
            gradient, divided = gradient.to_local(), True
        gradients.append(gradient)
        squares[0 if id(parameter) in sharded else 1] += gradient.detach().float().square().sum()
    if divided and (data := group.data_group) is not None:
        dist.all_reduce(squares, group=data)
    norm = (group.sum_(squares[:1].clone())[0] + squares[1]).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # the constant of torch.nn.utils.clip_grad_norm_
    for gradient in gradients:
        gradient.detach().mul_(scale.to(gradient.dtype))
    return norm
