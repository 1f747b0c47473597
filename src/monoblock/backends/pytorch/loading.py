"""Weights from a checkpoint's files into a model whose parameters have no memory yet (on the meta device).

A tensor whose dtype and layout fit becomes the parameter as it lies in the mapped file; any other is written
into its final memory piece by piece. There is never a second copy of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from monoblock.checkpoint.fitting import Report, matched
from monoblock.checkpoint.keymap import KeyMap, Same, Source, Split
from monoblock.checkpoint.store import Store
from monoblock.checkpoint.views import DTYPE_NAMES
from monoblock.checkpoint.weights import Renamed, Tensors
from monoblock.errors import CheckpointError, ShapeMismatch

log = logging.getLogger("monoblock")

DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2")
}
MANY = 100_000_000  # weights, which take a second or more to pack
STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Uninitialised(TorchFunctionMode):
    """Skips `torch.nn.init`, whose results are thrown away where parameters have no memory yet.

    Not only to save work: on the meta device, `normal_` makes PyTorch import its compiler, which takes a second.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


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
    model: nn.Module,
    parameters: Mapping[str, str],
    keymap: KeyMap,
    store: Tensors,
    *,
    dtype: torch.dtype,
    device: Callable[[str], torch.device],
    tied: Iterable[str],
    ignore_mismatched_sizes: bool,
    put: Callable[[str, Tensor], None] | None = None,
) -> Report:
    """Fill the model. `parameters`: canonical name -> name in the model; `device` says where each goes. `put` takes
    each tensor by its name in the model, if it is not just to become the parameter.

    MissingKeys, UnexpectedKeys, UnreadKeys and ShapeMismatch name the first offender and the nearest known name.
    A head that the files lack is left to be made anew, and reported.
    """
    shapes = {name: tuple(model.get_parameter(path).shape) for name, path in parameters.items()}
    sources, report = matched(store, keymap, shapes, tied, ignore_mismatched_sizes=ignore_mismatched_sizes)
    for canonical, source in _watched(sources, shapes) if put else sources.items():
        path = parameters[canonical]
        tensor = read(source, store, shapes[canonical], dtype, device(path))
        if put is None:
            assign(model, path, tensor)
        else:
            put(path, tensor)
    return report


def _watched(
    sources: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Source]]:
    """The sources, with a bar at a terminal where there is enough to pack that one waits for it."""
    from monoblock.pipelines.progress import shown

    many = sum(prod(shapes[name]) for name in sources) > MANY
    return shown(iter(sources.items()), len(sources), None if many else False)


def assign(model: nn.Module, path: str, tensor: Tensor) -> None:
    """Make the tensor the parameter of that name."""
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    trainable = module._parameters[name].requires_grad  # pyright: ignore[reportOptionalMemberAccess]
    module._parameters[name] = nn.Parameter(tensor, requires_grad=trainable)


def read(
    source: Source, store: Tensors, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A canonical tensor out of the files: as it lies there if it can be, else assembled in its final memory."""
    plain = device.type == "cpu" and all(_stored(store, name) == dtype for name in source.names)
    if plain and isinstance(source.op, Same):
        # A transposed view, of another framework's file, becomes an ordinary parameter.
        return store.tensor(source.names[0]).contiguous()
    whole = (
        store.joined(source.names)
        if plain and type(source.op) is Split and isinstance(store, Store | Renamed)
        else None
    )
    if whole is not None:
        return whole.reshape(shape)
    target = torch.empty(shape, dtype=dtype, device=device)
    for view, name in zip(source.op.views(target), source.names, strict=True):
        view.copy_(store.tensor(name).reshape(view.shape))
    return target


def _stored(store: Tensors, name: str) -> torch.dtype | None:
    """The dtype in the file, if PyTorch has it."""
    return getattr(torch, DTYPE_NAMES[store.dtype(name)], None)


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def split_state(
    keymap: KeyMap, parameters: Mapping[str, Tensor], state: Mapping[str, Any], tied: Iterable[str]
) -> dict[str, Tensor]:
    """A hub-named state dict as canonical tensors; CheckpointError says what does not fit."""
    plan = keymap.plan(parameters, state, tied)
    if bad := plan.unknown or plan.unread:
        raise CheckpointError(
            f"the state dict holds {bad[0]}{_others(bad)}, for which this model has no place"
        )
    canonical: dict[str, Tensor] = {}
    for name, source in plan.sources.items():
        target = torch.empty_like(parameters[name], device=state[source.names[0]].device)
        for view, key in zip(source.op.views(target), source.names, strict=True):
            if view.numel() != state[key].numel():
                raise ShapeMismatch(f"{key} is {list(state[key].shape)}, expected {list(view.shape)}")
            view.copy_(state[key].reshape(view.shape))
        canonical[name] = target
    return canonical
