"""The shards of a model from files, and back: a process reads its slices of each tensor, and nothing else."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from monoblock.backends.pytorch.base import ModelBase
from monoblock.backends.pytorch.parallel.groups import TensorGroup
from monoblock.checkpoint import quantized
from monoblock.checkpoint.array_adapters import DTYPE_NAMES
from monoblock.checkpoint.keymap import TensorSource
from monoblock.checkpoint.save import LazyTensor
from monoblock.checkpoint.weights import Tensors
from monoblock.heads import HeadSpec
from monoblock.partition import Sharding, shard_op, shardings
from monoblock.quantization import LOSSLESS, WeightOnlyConfig
from monoblock.spec import ArchSpec

_END = -1  # in place of the number of a tensor: the first process needs no more
_STORED = {getattr(torch, name): stored for stored, name in DTYPE_NAMES.items() if hasattr(torch, name)}


def check_loading(model: ModelBase, store: Tensors, how: Any) -> None:
    """ValueError: the files or this quantisation cannot be sharded."""
    if quantized.is_quantized(store):
        raise ValueError(
            f"{model.name_or_path or 'the checkpoint'} has quantised weights, which tp_plan does not shard: load the "
            "unquantised weights with quantization_config='int8' or 'int4'"
        )
    if not isinstance(how, WeightOnlyConfig) or how.bits == LOSSLESS:
        return
    att, width = model.spec.attention, model.spec.mlp.width
    for what, inputs in (("attention output", att.heads * att.head_dim), ("MLP", width)):
        if inputs % how.group_size:
            raise ValueError(
                f"quantization_config with groups of {how.group_size}: a shard of the {what} has {inputs} inputs, "
                "which is no multiple: give a smaller group_size, fewer processes, or no quantisation"
            )


def agree(model: ModelBase, made: Iterable[str], group: TensorGroup) -> None:
    """Give all processes the same values of newly initialised parameters. ValueError: one of them is sharded."""
    shards = dict(named_shards(model))
    for name in made:
        if shards[name].dim is not None:
            raise ValueError(
                f"the checkpoint lacks {name}, which tp_plan would shard: load it without tp_plan, train and save it"
            )
        dist.broadcast(model.get_parameter(name).detach(), group=group.group, group_src=0)


def read_shard(
    spec: ArchSpec,
    head: HeadSpec | None,
    store: Tensors,
    group: TensorGroup,
    shapes: Mapping[str, tuple[int, ...]],
    canonical: str,
    source: TensorSource,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The process's shard of a canonical parameter of the whole model `spec`, in new memory. `shapes`: the shards'."""
    rank, count, shape = group.rank, group.size, shapes[canonical]
    target = torch.empty(shape, dtype=dtype, device=device)
    shards = shardings(spec, head, canonical, source.op)
    for view, name, shard in zip(shard_op(source.op, count).views(target), source.names, shards, strict=True):
        tensor = store.tensor(name)
        if shard.dim is None:
            view.copy_(tensor.reshape(view.shape))
            continue
        slices = shard.slices(rank, count)
        if len(slices) == 1:  # the view may have further dimensions, such as heads
            piece = _part(tensor, shard.dim, slices[0])
            view.copy_(piece.reshape(view.shape))
            continue
        start = 0
        for one in slices:
            size = one.stop - one.start
            view.narrow(shard.dim, start, size).copy_(_part(tensor, shard.dim, one))
            start += size
    return target


def _part(tensor: Tensor, dim: int, part: slice) -> Tensor:
    return tensor.narrow(dim, part.start, part.stop - part.start)


@contextlib.contextmanager
def whole_tensors(model: Any, group: TensorGroup) -> Iterator[dict[str, Any] | None]:
    """The tensors of a sharded model as files hold them, for the first process of the mesh, each gathered when it is
    read in the context; None in the other processes, which take part in gathering what the first one asks for until it
    leaves the context. Parameters that FSDP2 shards over the axis "data" are gathered over that axis first."""
    shards = list(named_shards(model))
    if not group.first:
        while (number := group.agreed(_END, everywhere=True)) != _END:
            own = _unsharded(model.get_parameter(shards[number][0]))
            if group.writes and shards[number][1].dim is not None:
                dist.send(own, group=group.group, group_dst=0)
        yield None
        return
    found: dict[str, Any] = {}
    for number, (name, shard) in enumerate(shards):
        own = model.get_parameter(name)
        shape = list(own.shape)
        if shard.dim is not None:
            shape[shard.dim] = sum(shard.sizes)
        make = functools.partial(_receive, own, tuple(shape), shard, group, number)
        found[name] = LazyTensor(dtype=_STORED[own.dtype], shape=tuple(shape), make=make)
    try:
        yield found
    finally:
        group.agreed(_END, everywhere=True)


def _unsharded(own: Any) -> Tensor:
    """A process's shard of the tensor axis, gathered over the processes that FSDP2 divides it over."""
    return (own.full_tensor() if hasattr(own, "full_tensor") else own).detach().contiguous()


def named_shards(model: Any) -> Iterator[tuple[str, Sharding]]:
    """Name and sharding of each parameter."""
    spec, head, keymap = model.config.to_spec(), model.head_spec, model.keymap()
    for canonical in model.shapes():
        source = keymap.source(canonical)
        yield from zip(source.names, shardings(spec, head, canonical, source.op), strict=True)


def _receive(own: Tensor, shape: tuple[int, ...], shard: Sharding, group: TensorGroup, number: int) -> Tensor:
    """The whole of the tensor `number`, in the first process."""
    group.agreed(number, everywhere=True)
    mine = _unsharded(own)
    if shard.dim is None:
        return mine
    whole = torch.empty(shape, dtype=mine.dtype, device=mine.device)
    for rank in range(group.size):
        given, held = mine, list(mine.shape)
        if rank:
            held[shard.dim] = shard.size(rank, group.size)
            given = torch.empty(held, dtype=mine.dtype, device=mine.device)
            dist.recv(given, group=group.group, group_src=rank)
        start = 0
        for one in shard.slices(rank, group.size):
            size = one.stop - one.start
            _part(whole, shard.dim, one).copy_(given.narrow(shard.dim, start, size))
            start += size
    return whole
