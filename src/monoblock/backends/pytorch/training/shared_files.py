"""The states of a run in several processes as files of torch.distributed.checkpoint (DCP): each process writes its
parts of the tensors, and any number of processes reads them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from monoblock.backends.pytorch.parallel.layout import Box, TensorLayout
from monoblock.errors import CheckpointError
from monoblock.training.checkpoints import SHARED


class Held(NamedTuple):
    """The part of a tensor that this process holds."""

    layout: TensorLayout
    tensor: Tensor


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes))


def _found(states: Mapping[str, Held], index: MetadataIndex) -> Tensor:
    """The view of the part that begins there."""
    held = states[index.fqn]
    offsets = tuple(index.offset or ())
    return next(box for box in held.layout.boxes if box.offsets == offsets).of(held.tensor)


class Written:
    """The end of writing in the background."""

    def __init__(self, folder: Path, future: Future[Any]) -> None:
        self.folder, self.future = folder, future

    def done(self) -> bool:
        """Whether the files are written, or will not be."""
        return self.future.done()

    def result(self) -> None:
        """Wait for the end. CheckpointError: a process could not write."""
        try:
            self.future.result()
        except CheckpointException as error:
            raise CheckpointError(f"{self.folder} could not be written: {_reason(error)}") from error


class _Writing(DefaultSavePlanner):
    """Plans the boxes of this process; DCP writes a box that several processes have once."""

    def __init__(self, states: Mapping[str, Held]) -> None:
        super().__init__(flatten_state_dict=False)
        self.states = states

    def create_local_plan(self) -> SavePlan:
        items: list[WriteItem] = []
        for name, (layout, tensor) in self.states.items():
            for number, box in enumerate(layout.boxes):
                chunk = _chunk(box)
                data = TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(tensor),
                    size=torch.Size(layout.shape),
                )
                index = MetadataIndex(name, chunk.offsets, number)
                items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return _found(self.states, index)


class _Reading(DefaultLoadPlanner):
    """Plans what the boxes of this process need of the boxes in the files."""

    def __init__(self, states: Mapping[str, Held]) -> None:
        super().__init__(flatten_state_dict=False)
        self.states = states

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[Any] = []
        for name, (layout, _) in self.states.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, stored, [_chunk(box) for box in layout.boxes])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return _found(self.states, index)


def start(folder: Path, states: Mapping[str, Held], group: Any) -> Written:
    """Begin to write: the states are copied at once, the files written while the caller continues."""
    copies = {
        name: Held(held.layout, held.tensor.detach().to("cpu", copy=True)) for name, held in states.items()
    }
    files = FileSystemWriter(folder / SHARED)
    made: Any = async_save({}, storage_writer=files, planner=_Writing(copies), process_group=group)
    return Written(folder, made)


def stored(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The shape and the dtype of each tensor of a checkpoint. CheckpointError: it is unreadable."""
    try:
        found = FileSystemReader(folder / SHARED).read_metadata().state_dict_metadata
    except Exception as error:  # of unpickling
        raise CheckpointError(f"{folder / SHARED} has no readable .metadata: {error}") from error
    return {
        name: (tuple(one.size), one.properties.dtype)
        for name, one in found.items()
        if isinstance(one, TensorStorageMetadata)
    }


def read(folder: Path, states: Mapping[str, Held], group: Any) -> None:
    """Fill the tensors from the files. `group` None: in one process. CheckpointError: a tensor is missing or has
    another shape or dtype."""
    there = stored(folder)
    for name, (layout, tensor) in states.items():
        if name not in there:
            raise CheckpointError(f"{folder} lacks {name}: it is of another model")
        if there[name] != (layout.shape, tensor.dtype):
            shape, dtype = there[name]
            raise CheckpointError(
                f"{folder}: {name} is {shape} of {dtype}, expected {layout.shape} of {tensor.dtype}"
            )
    files = FileSystemReader(folder / SHARED)
    planner = _Reading(states)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process reads, which is meant
            load({}, storage_reader=files, planner=planner, process_group=group)
    except CheckpointException as error:
        raise CheckpointError(f"{folder} is not readable: {_reason(error)}") from error


def _reason(error: CheckpointException) -> str:
    """The first error of a process in one line."""
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"process {rank}: {' '.join(str(cause).split()) or type(cause).__name__}"
