"""The processes that hold the shards of one model, and their collectives with gradients.

A block's input is replicated and its inner activations are sharded (arXiv:1909.08053): `copied` enters the sharded part
(the identity; the gradients of all shards are summed), `summed` leaves it (a sum; the gradient is the same for all).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DATA, TENSOR = "data", "tensor"  # the names of the axes of the mesh


@dataclass(frozen=True, eq=False)
class TensorGroup:
    """The processes over which the tensor axis of a mesh shards a model, as one of them sees it. `mesh` has the axis
    "tensor" alone, or after "data"."""

    mesh: DeviceMesh
    device: torch.device

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # a copy of a model is sharded over the same processes

    def __reduce__(self) -> Any:
        raise ValueError(
            "a model with tp_plan cannot be pickled: its shards are in several processes; write it by save_pretrained"
        )

    @property
    def group(self) -> Any:
        """The process group."""
        return self.mesh.get_group(TENSOR)

    @property
    def rank(self) -> int:
        """This process's number in the group."""
        return self.mesh.get_local_rank(TENSOR)

    @property
    def size(self) -> int:
        """The number of processes."""
        return self.mesh[TENSOR].size()

    @property
    def writes(self) -> bool:
        """Whether this group is the first along the axis "data", whose shards are written."""
        return DATA not in (self.mesh.mesh_dim_names or ()) or self.mesh.get_local_rank(DATA) == 0

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        dist.all_reduce(x, group=self.group)
        return x

    @property
    def first(self) -> bool:
        """Whether this is the first process of the mesh."""
        return self.writes and self.rank == 0

    def agreed(self, value: int, *, everywhere: bool = False) -> int:
        """The value of the first process of the group, or (`everywhere`) of the mesh."""
        held = torch.tensor([value], dtype=torch.int64, device=self.device)
        if everywhere and self.rank == 0 and (data := self.data_group) is not None:
            dist.broadcast(held, group=data, group_src=0)
        dist.broadcast(held, group=self.group, group_src=0)
        return int(held)

    @property
    def data_group(self) -> Any:
        """The processes with the same shards along the axis "data"; None: the mesh has no such axis."""
        return self.mesh.get_group(DATA) if DATA in (self.mesh.mesh_dim_names or ()) else None


# The group of the models that are being constructed.
_current: ContextVar[TensorGroup | None] = ContextVar("tensor_group", default=None)


def current() -> TensorGroup | None:
    """The group of a model under construction; None: the model is whole."""
    return _current.get()


@contextlib.contextmanager
def constructing(group: TensorGroup | None) -> Iterator[None]:
    """A context in which models are constructed as shards of that group (None: whole)."""
    token = _current.set(group)
    try:
        yield
    finally:
        _current.reset(token)


def tensor_group(tp_plan: Any, tp_size: Any, device_mesh: Any) -> TensorGroup:
    """The group for arguments of `from_pretrained`; joins the processes that torchrun started, if the program has not.

    ValueError: a wrong argument, or the program runs in one process that torchrun did not start.
    """
    if tp_plan != "auto":
        raise ValueError(
            f"tp_plan={tp_plan!r} is not supported: 'auto' shards by the plan of the model's spec (monoblock.partition)"
        )
    if device_mesh is not None:
        return TensorGroup(_checked(device_mesh, tp_size), _device(device_mesh.device_type))
    if not dist.is_initialized():
        if "WORLD_SIZE" not in os.environ:
            raise ValueError(
                "tp_plan='auto' shards a model over several processes: start the program by `torchrun "
                "--nproc-per-node N`, or set up torch.distributed before"
            )
        kind = "cuda" if torch.cuda.device_count() > int(os.environ.get("LOCAL_RANK", "0")) else "cpu"
        if kind == "cuda":
            torch.cuda.set_device(_device(kind))
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
    world = dist.get_world_size()
    size = world if tp_size is None else tp_size
    if not isinstance(size, int) or size < 1 or world % size:
        raise ValueError(f"tp_size={tp_size!r} must divide the number of processes, {world}")
    return TensorGroup(_mesh(kind, world, size, dist.group.WORLD), _device(kind))


@functools.lru_cache(maxsize=8)
def _mesh(kind: str, world: int, size: int, default_group: Any) -> DeviceMesh:
    """The mesh of these sizes in a program's default group: each new one would make further process groups."""
    from torch.distributed.device_mesh import init_device_mesh

    del default_group
    return init_device_mesh(kind, (world // size, size), mesh_dim_names=(DATA, TENSOR))


def _checked(mesh: Any, tp_size: Any) -> DeviceMesh:
    from torch.distributed.device_mesh import DeviceMesh

    names = getattr(mesh, "mesh_dim_names", None)
    if not isinstance(mesh, DeviceMesh) or names not in ((TENSOR,), (DATA, TENSOR)):
        raise ValueError(
            f"device_mesh must be a torch DeviceMesh with the axis {TENSOR!r}, or {DATA!r} and {TENSOR!r}; got {names}"
        )
    if tp_size not in (None, mesh[TENSOR].size()):
        raise ValueError(
            f"tp_size={tp_size}, but device_mesh has {mesh[TENSOR].size()} processes in {TENSOR!r}"
        )
    return mesh


def _device(kind: str) -> torch.device:
    if kind != "cuda":
        return torch.device(kind)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))


# ---------------------------------------------------------------------------- collectives with gradients


def copied(x: Tensor, group: TensorGroup) -> Tensor:
    """x, whose gradients of all processes are summed."""
    return _Copied.apply(x, group) if _traces(x) else x  # pyright: ignore[reportReturnType]


def summed(x: Tensor, group: TensorGroup) -> Tensor:
    """The sum over the processes, whose gradient is the same in all. x may be overwritten."""
    return _Summed.apply(x, group) if _traces(x) else group.sum_(x.contiguous())  # pyright: ignore


def added(x: Tensor, group: TensorGroup) -> Tensor:
    """The sum over the processes, of which each uses the result for its own shard: gradients are summed too."""
    return copied(summed(x.clone(), group), group)


def joined(x: Tensor, sizes: list[int], group: TensorGroup) -> Tensor:
    """The shards (..., n), `sizes` values long, concatenated; the gradient of a shard is its slice."""
    return _Joined.apply(x, sizes, group) if _traces(x) else _gathered(x, sizes, group)  # pyright: ignore


def _traces(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _gathered(x: Tensor, sizes: list[int], group: TensorGroup) -> Tensor:
    """The shards of all processes, padded to one length for the exchange."""
    longest = max(sizes)
    own = torch.nn.functional.pad(x, (0, longest - x.shape[-1])).contiguous()
    found = [torch.empty_like(own) for _ in sizes]
    dist.all_gather(found, own, group=group.group)
    return torch.cat([one[..., :size] for one, size in zip(found, sizes, strict=True)], dim=-1)


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.sum_(gradients[0].clone(memory_format=torch.contiguous_format)), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        del ctx
        return group.sum_(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        del ctx
        return gradients[0], None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: TensorGroup) -> Tensor:
        ctx.start, ctx.size = sum(sizes[: group.rank]), sizes[group.rank]
        return _gathered(x, sizes, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0].narrow(-1, ctx.start, ctx.size), None, None
