"""Loads a checkpoint's weights into a model on the meta device.

A tensor of matching dtype and layout becomes the parameter without a copy, memory-mapped from the file; any other is
copied into newly allocated memory, one tensor at a time. There is never a second copy of the model in memory.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from monoblock.backends.pytorch.parts import views
from monoblock.checkpoint.array_adapters import DTYPE_NAMES
from monoblock.checkpoint.keymap import KeyMap, PerHead, Same, Split, TensorSource
from monoblock.checkpoint.matching import LoadReport, match_tensors
from monoblock.checkpoint.store import Store
from monoblock.checkpoint.weights import RenamedTensors, Tensors
from monoblock.errors import CheckpointError, ShapeMismatch

log = logging.getLogger("monoblock")

DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2")
}
MANY = 100_000_000  # weights from which quantisation takes a second or more
STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Uninitialised(TorchFunctionMode):
    """Skips the functions of `torch.nn.init` for parameters on the meta device.

    On the meta device, `normal_` would also make PyTorch import its compiler, which takes a second.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def new_parameters_device() -> torch.device:
    """The device of newly registered parameters: PyTorch's default, unless a patch such as accelerate's
    `init_empty_weights` moves them at registration."""
    probe = nn.Module()
    probe.register_parameter("probe", nn.Parameter(torch.empty(0)))
    return probe.get_parameter("probe").device


def chosen_dtype(asked: str | torch.dtype | None, configured: str | None, store: Tensors) -> torch.dtype:
    """The dtype to load in. "auto" and None: the config's, else that of the first float tensor in the files."""
    if isinstance(asked, torch.dtype):
        if asked not in DTYPES.values():
            raise ValueError(f"dtype must be a floating-point type, got {asked}")
        return asked
    if asked not in (None, "auto"):
        name = str(asked).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"dtype must be 'auto' or one of {', '.join(DTYPES)}, got {asked!r}")
        return DTYPES[name]
    if configured in DTYPES:
        return DTYPES[configured]
    found = next((STORED[store.dtype(key)] for key in store if store.dtype(key) in STORED), "float32")
    return DTYPES[found]


def load(
    model: Any,
    own: Mapping[str, TensorSource],
    keymap: KeyMap,
    store: Tensors,
    *,
    dtype: torch.dtype,
    device: Callable[[str], torch.device],
    shapes: Mapping[str, tuple[int, ...]],
    tied: Iterable[str],
    ignore_mismatched_sizes: bool,
    put: Callable[[str, Tensor], None] | None = None,
    ignored: Callable[[str], bool] | None = None,
    strict: bool = True,
    read_shard: Callable[[str, TensorSource, torch.dtype, torch.device], Tensor] | None = None,
    wanted: Callable[[str], bool] | None = None,
) -> LoadReport:
    """Fill the model. `own`: canonical name -> the parameters of the model that hold it; `shapes` are the
    canonical ones; `device` maps a parameter to its device. `put` (path, tensor) replaces the assignment to the
    parameter. `read_shard` (canonical name, source, dtype, device) reads a shard of a canonical tensor; `shapes` are
    then those of the whole model. `wanted` (canonical name): whether a tensor is read; all by default.

    MissingKeys, UnexpectedKeys, UnreadKeys and ShapeMismatch name the first such tensor and the nearest known name.
    A head that is missing in the files is reported, for the caller to initialise.
    """
    sources, report = match_tensors(
        store,
        keymap,
        shapes,
        tied,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
        ignored=ignored,
        strict=strict,
    )
    if wanted is not None:
        sources = {name: source for name, source in sources.items() if wanted(name)}
    for canonical, source in _with_progress(sources, shapes) if put else sources.items():
        here = own[canonical]
        if read_shard is not None:
            shard = read_shard(canonical, source, dtype, device(here.names[0]))
            tensors = as_parameters(here, shard)
        elif put is not None and isinstance(here.op, Split) and source.op == here.op:
            # One at a time, so that only one unquantised matrix is in memory.
            for i, (name, size) in enumerate(zip(here.names, here.op.sizes, strict=True)):
                one = TensorSource(source.names[i : i + 1], Same())
                put(name, read(one, store, (size, *shapes[canonical][1:]), dtype, device(name)))
            continue
        else:
            tensors = parameter_tensors(here, source, store, shapes[canonical], dtype, device(here.names[0]))
        for name, tensor in zip(here.names, tensors.parts, strict=True):
            (put or functools.partial(assign, model))(name, tensor)
        if put is None and tensors.whole is not None:
            register_fused(model, here.names, tensors.whole)
    return report


@dataclass
class ParameterTensors:
    """A canonical tensor as the model's parameters; `whole`: the fused tensor of which they are views."""

    parts: list[Tensor]
    whole: Tensor | None = None


def parameter_tensors(
    own: TensorSource,
    source: TensorSource,
    store: Tensors,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> ParameterTensors:
    """Read a canonical tensor from the files as the model's parameters."""
    if isinstance(own.op, PerHead) and source.op == own.op:
        return ParameterTensors([read(TensorSource(source.names, Same()), store, shape, dtype, device)])
    return as_parameters(own, read(source, store, shape, dtype, device))


def as_parameters(own: TensorSource, whole: Tensor) -> ParameterTensors:
    """Split a canonical tensor into the model's parameters."""
    match own.op:
        case Split(sizes=sizes):
            return ParameterTensors(views(whole, sizes), whole)
        case PerHead():
            return ParameterTensors([own.op.views(whole)[0].reshape(whole.shape)])
        case _:
            return ParameterTensors(list(own.op.views(whole)))


def register_fused(model: Any, names: Sequence[str], whole: Tensor) -> None:
    """Record in the part that contains these parameters that they are views of one fused tensor."""
    owner, leaf, kind = names[0].rsplit(".", 2)
    part = model.get_submodule(owner)
    role = next(role for role, name in part.roles.items() if name == leaf)
    part.fused_tensors.setdefault(role, {})[kind] = whole


def _with_progress(
    sources: Mapping[str, TensorSource], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, TensorSource]]:
    """The sources, with a progress bar at a terminal if quantisation takes long."""
    from monoblock.pipelines.progress import with_progress_bar

    many = sum(prod(shapes[name]) for name in sources) > MANY
    return with_progress_bar(iter(sources.items()), len(sources), None if many else False)


def assign(model: nn.Module, path: str, tensor: Tensor) -> None:
    """Make the tensor the parameter of that name."""
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    trainable = module._parameters[name].requires_grad  # pyright: ignore[reportOptionalMemberAccess]
    module._parameters[name] = nn.Parameter(tensor, requires_grad=trainable)


def read(
    source: TensorSource, store: Tensors, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Read a canonical tensor from the files: memory-mapped if possible, else copied into new memory."""
    plain = device.type == "cpu" and all(_stored(store, name) == dtype for name in source.names)
    if plain and isinstance(source.op, Same):
        # A transposed view, of another framework's file, becomes an ordinary parameter.
        return store.tensor(source.names[0]).contiguous()
    whole = (
        store.concatenated(source.names)
        if plain and type(source.op) is Split and isinstance(store, Store | RenamedTensors)
        else None
    )
    if whole is not None:
        return whole.reshape(shape)
    target = torch.empty(shape, dtype=dtype, device=device)
    for view, name in zip(source.op.views(target), source.names, strict=True):
        view.copy_(store.tensor(name).reshape(view.shape))
    return target


def _stored(store: Tensors, name: str) -> torch.dtype | None:
    """The dtype in the file, or None if PyTorch does not have it."""
    return getattr(torch, DTYPE_NAMES[store.dtype(name)], None)


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def split_state(
    keymap: KeyMap,
    own: Mapping[str, TensorSource],
    shapes: Mapping[str, tuple[int, ...]],
    state: Mapping[str, Any],
    tied: Iterable[str],
    strict: bool,
) -> dict[str, Tensor] | None:
    """A state dict of any known naming scheme, by the model's own names; None if it is not of this family, or (not
    `strict`) has unknown names. CheckpointError: an unknown name or shape."""
    plan = keymap.match(shapes, state, tied)
    bad = plan.unknown or plan.unread
    if not plan.sources or (bad and not strict):
        return None
    if bad:
        raise CheckpointError(f"the state dict holds {bad[0]}{_others(bad)}, which this model does not have")
    found: dict[str, Tensor] = {}
    for name, source in plan.sources.items():
        given = [state[key] for key in source.names]
        if source.names == own[name].names or source.op == own[name].op:
            found |= dict(zip(own[name].names, given, strict=True))
            continue
        whole = torch.empty(shapes[name], dtype=given[0].dtype, device=given[0].device)
        for view, key, tensor in zip(source.op.views(whole), source.names, given, strict=True):
            if view.numel() != tensor.numel():
                raise ShapeMismatch(f"{key} is {list(tensor.shape)}, expected {list(view.shape)}")
            view.copy_(tensor.reshape(view.shape))
        found |= dict(zip(own[name].names, as_parameters(own[name], whole).parts, strict=True))
    return found
