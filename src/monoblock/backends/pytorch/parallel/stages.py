"""Pipeline stages: each process holds consecutive layers of a model, the first one also the embeddings, the last one
the final norm and the head (arXiv:1811.06965)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from monoblock.backends.pytorch.cache import DynamicCache
from monoblock.spec import ArchSpec


@dataclass(frozen=True)
class Stage:
    """The stage `index` of `count`: the layers from `start` to `end` - 1."""

    index: int
    count: int
    start: int
    end: int

    @property
    def first(self) -> bool:
        """Whether it has the embeddings."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether it has the head."""
        return self.index == self.count - 1

    def holds(self, canonical: str, spec: ArchSpec) -> bool:
        """Whether a canonical parameter is read by this stage. A tied head reads the embedding's matrix."""
        if canonical.startswith("blocks."):
            return self.start <= int(canonical.split(".")[1]) < self.end
        if canonical.startswith(("final_norm.", "head.")):
            return self.last
        return self.first or (self.last and spec.tie_head and canonical == "embed.weight")


def check_stages(spec: ArchSpec, count: int, argument: str) -> None:
    """ValueError: there are fewer layers than stages."""
    if not 1 <= count <= spec.layers:
        raise ValueError(
            f"{argument}={count}: the model has {spec.layers} layers: give at most as many stages"
        )


def stage_of(spec: ArchSpec, index: int, count: int) -> Stage:
    """A stage of a model whose layers are divided evenly; the first stages have one more if they do not divide."""
    few, more = divmod(spec.layers, count)
    start = index * few + min(index, more)
    return Stage(index, count, start, start + few + (index < more))


# The index and the number of the stages of the model that is being constructed.
_current: ContextVar[tuple[int, int] | None] = ContextVar("pipeline_stage", default=None)


@contextlib.contextmanager
def constructing_stage(index: int, count: int) -> Iterator[None]:
    """A context in which `from_pretrained` gives a stage of a model."""
    token = _current.set((index, count))
    try:
        yield
    finally:
        _current.reset(token)


def current_stage(spec: ArchSpec) -> Stage | None:
    """The stage of a model under construction; None: the model is whole."""
    found = _current.get()
    return None if found is None else stage_of(spec, *found)


class OtherStage(nn.Module):
    """In place of a layer that another process has."""

    def forward(self, *_: Any) -> Any:
        raise RuntimeError("this layer is in another stage of the pipeline")


def remove_others(layers: Any, stage: Stage) -> None:
    """Replace the layers of other stages in a list of all layers."""
    for index in range(len(layers)):
        if not stage.start <= index < stage.end:
            layers[index] = OtherStage()


class StageCache(DynamicCache):
    """The keys and values of a stage's layers."""

    def __init__(self, spec: ArchSpec, stage: Stage) -> None:
        super().__init__()
        self.windows = spec.windows[stage.start : stage.end]
        self._start = stage.start

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        return super().update(key_states, value_states, layer_idx - self._start)


def placed(model: Any) -> tuple[torch.device, torch.dtype]:
    """The device and the floating-point dtype of a stage's parameters; each layer has norms, which are not
    quantised."""
    found = next(x for x in model.parameters() if x.is_floating_point() and x.device.type != "meta")
    return found.device, found.dtype
