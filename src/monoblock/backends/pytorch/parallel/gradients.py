"""The norm of the gradients of a sharded model, of which each process has a part."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from monoblock.backends.pytorch.parallel.files import named_shards
from monoblock.backends.pytorch.parallel.groups import TensorGroup


def clip(model: Any, group: TensorGroup, max_norm: float) -> Tensor:
    """Scale all gradients so that their norm is at most `max_norm`; returns their norm before, the same in all
    processes. Replicated parameters are counted once."""
    return clip_parameters(model.parameters(), sharded(model), group, max_norm)


def sharded(model: Any) -> set[int]:
    """The ids of the parameters that the tensor axis divides."""
    return {id(model.get_parameter(name)) for name, shard in named_shards(model) if shard.dim is not None}


def clip_parameters(
    parameters: Iterable[Tensor], divided: Collection[int], group: TensorGroup, max_norm: float
) -> Tensor:
    """`clip` for these parameters; those with an id in `divided` are shards of the tensor axis."""
    squares = torch.zeros(
        2, dtype=torch.float32, device=group.device
    )  # of sharded and of replicated parameters
    gradients: list[Tensor] = []
    fsdp = False
    for parameter in parameters:
        gradient: Any = parameter.grad
        if gradient is None:
            continue
        if hasattr(gradient, "to_local"):  # FSDP2 divides it over the axis "data"
            gradient, fsdp = gradient.to_local(), True
        gradients.append(gradient)
        squares[0 if id(parameter) in divided else 1] += gradient.detach().float().square().sum()
    if fsdp and (data := group.data_group) is not None:
        dist.all_reduce(squares, group=data)
    norm = (group.sum_(squares[:1].clone())[0] + squares[1]).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # the constant of torch.nn.utils.clip_grad_norm_
    for gradient in gradients:
        gradient.detach().mul_(scale.to(gradient.dtype))
    return norm
