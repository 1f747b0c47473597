"""The processes of torch.distributed that train one model together, and the collectives of their host values."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from monoblock.backends.pytorch.parallel.groups import DATA, TENSOR, TensorGroup
from monoblock.backends.pytorch.pipeline_adapter import found_device
from monoblock.training.options import TrainingOptions
from monoblock.training.processes import Processes

_FAILED = "monoblock/failed"  # a counter in the launcher's store
_LOST = ("gloo", "nccl", "connection", "store")  # in errors of torch.distributed


class TorchProcesses(Processes):
    """The processes of a mesh with the axes "data", which divides rows, and "tensor", which divides matrices."""

    def __init__(self, mesh: Any, device: torch.device) -> None:
        self.group = TensorGroup(mesh, device)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.row, self.rows = mesh.get_local_rank(DATA), mesh[DATA].size()
        # Of its own, on CPUs, since a checkpoint is written while steps communicate.
        self.files: Any = dist.new_group(backend="gloo")

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.group.device

    @property
    def data(self) -> Any:
        """The group of the processes that divide the rows and have the same part of each matrix."""
        return self.group.data_group

    def agreed(self, value: Any) -> Any:
        held = [value]
        dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        return held[0]

    def any(self, flag: bool) -> bool:
        held = torch.tensor(int(flag))
        dist.all_reduce(held, op=dist.ReduceOp.MAX)
        return bool(held)

    def collected(self, value: Any) -> list[Any] | None:
        found: list[Any] | None = [None] * self.size if self.first else None
        dist.gather_object((self.row, value) if self.group.rank == 0 else None, found, dst=0)
        if found is None:
            return None
        return [one[1] for one in sorted((one for one in found if one is not None), key=lambda one: one[0])]

    def seed_step(self, seed: int, step: int) -> None:
        state = np.random.SeedSequence([seed % 2**64, step, self.row]).generate_state(2)
        torch.manual_seed(int(state[0]) << 31 ^ int(state[1]))

    def failure(self, error: BaseException) -> str | None:
        try:
            store: Any = dist.distributed_c10d._get_default_store()
            if store.add(_FAILED, 1) > 1:
                return None
        except (RuntimeError, ValueError):  # the store was in the first process, which has ended
            return None
        who, text = f"process {self.rank} of {self.size}", " ".join(str(error).split())
        if isinstance(error, RuntimeError) and any(word in text.lower() for word in _LOST):
            return f"{who} lost the connection to another one, which ended without a message ({text[:80]})"
        return text if self.first else f"{who}: {text}"

    def leave(self) -> None:
        with contextlib.suppress(RuntimeError, ValueError):
            dist.destroy_process_group()

    def sum_(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the processes that divide the rows, in place."""
        dist.all_reduce(x, group=self.data)
        return x


def join(options: TrainingOptions) -> TorchProcesses:
    """Join the processes that a launcher started, one for each GPU of a machine, or on its CPUs. ValueError: the device
    cannot be chosen so."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = found_device(None if options.device == "auto" else options.device)
    if device.type not in ("cpu", "cuda") or device.index not in (None, local):
        raise ValueError(
            f"device={options.device}: several processes take auto, cpu or cuda, where each has a GPU of its own"
        )
    if device.type == "cuda":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
        if here > torch.cuda.device_count():
            raise ValueError(
                f"this machine has {torch.cuda.device_count()} GPUs for {here} processes: start fewer, or use "
                "device=cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    tensor = options.tensor_parallel
    mesh = init_device_mesh(
        device.type, (dist.get_world_size() // tensor, tensor), mesh_dim_names=(DATA, TENSOR)
    )
    return TorchProcesses(mesh, device)
