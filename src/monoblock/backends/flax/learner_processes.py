"""The processes and devices that fine-tune one model on JAX: a mesh with the axes data, fsdp and tensor."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import pickle
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from monoblock.training.options import AXES, TrainingOptions
from monoblock.training.processes import Launch, Processes

_START = 120  # seconds until all processes have been started
_LEAVE = 5000  # milliseconds in which all processes leave, if none failed alone
_FAILED = "monoblock/failed"  # a key of the first process that failed
_LOST = ("gloo", "nccl", "connection", "socket", "coordination", "distributed")  # in errors of XLA


class MeshProcesses(Processes):
    """The processes with the devices of a mesh. All of them pass the same rows, and the compiler divides them, so that
    for the trainer there is one part of the rows."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.rank, self.size = jax.process_index(), jax.process_count()
        self._failed = False

    @property
    def row_shards(self) -> int:
        """The number of parts into which the mesh divides the rows of a batch."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def axes(self) -> dict[str, Any]:
        """The axes, as the methods of a model take them; without one that divides nothing."""
        return {"fsdp_axis": "fsdp" if self.mesh.shape["fsdp"] > 1 else None}

    def agreed(self, value: Any) -> Any:
        if self.size == 1:
            return value
        data = pickle.dumps(value) if self.first else b""
        count = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
        # In powers of two, so that few programs are compiled.
        held = np.zeros(1 << max(6, (count - 1).bit_length()), np.uint8)
        held[: len(data)] = np.frombuffer(data, np.uint8)
        return pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(held))[:count].tobytes())

    def any(self, flag: bool) -> bool:
        if self.size == 1:
            return flag
        return bool(np.max(multihost_utils.process_allgather(np.int32(flag))))

    def collected(self, value: Any) -> list[Any] | None:
        return [value] if self.first else None  # which all have

    def failure(self, error: BaseException) -> str | None:
        self._failed = True
        if self.size == 1:
            return str(error)
        try:
            _client().key_value_set(_FAILED, str(self.rank))
        except Exception:  # another one was first, or the first process, which holds the keys, has ended
            return None
        text, who = " ".join(str(error).split()), f"process {self.rank} of {self.size}"
        if not isinstance(error, ValueError | OSError) and any(word in text.lower() for word in _LOST):
            return f"{who} lost the connection to another one, which ended without a message ({text[:80]})"
        return text if self.first else f"{who}: {text}"

    def leave(self) -> None:
        if self.size == 1 or not jax.distributed.is_initialized():
            return
        if self._failed:
            try:
                _client().wait_at_barrier("monoblock/leave", _LEAVE)
            except Exception:  # the others wait for this one in a collective: its end ends them
                atexit.register(_end)
                return
        with contextlib.suppress(RuntimeError):
            jax.distributed.shutdown()


def _client() -> Any:
    """The client of JAX's coordination service, which has no public name."""
    return importlib.import_module("jax._src.distributed").global_state.client


def _end() -> None:
    """End the process without waiting for others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def joined() -> bool:
    """Whether the program has joined other processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def join(options: TrainingOptions, started: Launch) -> MeshProcesses:
    """Join the processes that were started, and make the mesh of their devices. ValueError: the devices, or the rows of
    a batch, cannot be divided so. ConnectionError: the processes do not meet."""
    if started.size > 1 and not jax.distributed.is_initialized():
        if started.address is None:
            raise ValueError(
                f"{started.size} processes need an address at which they meet: set JAX_COORDINATOR_ADDRESS to "
                "HOST:PORT of the first one"
            )
        try:
            jax.distributed.initialize(
                started.address, started.size, started.rank, initialization_timeout=_START
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ConnectionError(
                f"process {started.rank} of {started.size} does not find the others at {started.address}: "
                f"{reason[:200]}"
            ) from error
    found = MeshProcesses(_mesh(options))
    if options.batch_size < found.row_shards:
        raise ValueError(
            f"batch_size={options.batch_size} is divided over {found.row_shards} parts of the mesh: give at least one "
            "row for each"
        )
    return found


def _mesh(options: TrainingOptions) -> Mesh:
    devices, count = _devices(options.device), 0
    count = len(devices)
    if options.mesh is not None:
        sizes = {axis: options.mesh_sizes.get(axis, 1) for axis in AXES}
        if np.prod(list(sizes.values())) != count:
            raise ValueError(f"mesh={options.mesh} must have as many devices as there are, {count}")
    else:
        tensor = options.tensor_parallel
        if count % tensor:
            raise ValueError(f"tensor_parallel={tensor} must divide the number of devices, {count}")
        rows = {"fsdp": count // tensor} if options.divides_weights else {"data": count // tensor}
        sizes = {axis: (rows | {"tensor": tensor}).get(axis, 1) for axis in AXES}
    # make_mesh puts neighbouring devices, those of one process, along the last axis.
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices)


def _devices(name: str) -> list[Any]:
    """All devices of all processes, of the kind with that name."""
    if ":" in name:
        raise ValueError(
            f"device={name}: a mesh has all devices of a kind: give auto, cpu, cuda or tpu, and choose them by the "
            "environment variable of their driver, such as CUDA_VISIBLE_DEVICES"
        )
    try:
        return jax.devices(None if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"device={name}: JAX has none: {' '.join(str(error).split())[:200]}") from error
