"""Weights from a checkpoint's files into a model whose parameters have no memory yet (on the meta device).

A tensor whose dtype and layout fit becomes the parameter as it lies in the mapped file; any other is written
into its final memory piece by piece. There is never a second copy of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from monoblock.checkpoint.keymap import KeyMap, Same, Source, nearest
from monoblock.checkpoint.store import Store
from monoblock.errors import CheckpointError, MissingKeys, ShapeMismatch, UnexpectedKeys, UnreadKeys

log = logging.getLogger("monoblock")

DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2")
}
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


@dataclass
class Report:
    """What a load did not find in the files (`missing`, made anew), did not use, or could not fit."""

    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)


def chosen_dtype(asked: str | torch.dtype | None, configured: str | None, store: Store) -> torch.dtype:
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
    store: Store,
    *,
    dtype: torch.dtype,
    device: Callable[[str], torch.device],
    tied: Iterable[str],
    ignore_mismatched_sizes: bool,
) -> Report:
    """Fill the model. `parameters`: canonical name -> name in the model; `device` says where each goes.

    MissingKeys, UnexpectedKeys, UnreadKeys and ShapeMismatch name the first offender and the nearest known name.
    A head that the files lack is left to be made anew, and reported.
    """
    plan = keymap.plan(parameters, store, tied)
    report = Report(unused=[key for key in plan.unread if keymap.is_head(key)])
    _check_names(
        keymap, store, plan.missing, [k for k in plan.unread if k not in report.unused], plan.unknown
    )
    report.missing = plan.missing
    for canonical, source in plan.sources.items():
        path = parameters[canonical]
        shape = tuple(model.get_parameter(path).shape)
        if problem := _misfit(canonical, shape, source, store):
            if not ignore_mismatched_sizes:
                raise ShapeMismatch(problem)
            report.mismatched.append(canonical)
            continue
        assign(model, path, _read(source, store, shape, dtype, device(path)))
    return report


def assign(model: nn.Module, path: str, tensor: Tensor) -> None:
    """Make the tensor the parameter of that name."""
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    trainable = module._parameters[name].requires_grad  # pyright: ignore[reportOptionalMemberAccess]
    module._parameters[name] = nn.Parameter(tensor, requires_grad=trainable)


def _read(
    source: Source, store: Store, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if isinstance(source.op, Same):
        # A transposed view, of another framework's file, becomes an ordinary parameter.
        return store.tensor(source.names[0]).to(device=device, dtype=dtype).contiguous()
    target = torch.empty(shape, dtype=dtype, device=device)
    for view, name in zip(source.op.views(target), source.names, strict=True):
        view.copy_(store.tensor(name).reshape(view.shape))
    return target


def _misfit(canonical: str, shape: tuple[int, ...], source: Source, store: Store) -> str | None:
    """What is wrong with the shapes of a parameter's tensors in the files, if anything."""
    ghost = torch.empty(shape, device="meta")
    for view, name in zip(source.op.views(ghost), source.names, strict=True):
        expected, found = tuple(view.shape), tuple(store.shape(name))
        same_size = len(expected) > len(shape) and found == shape
        if found != expected and not same_size:
            return (
                f"{name} ({canonical}) is {list(found)} in {store.path(name).name}, but the config implies "
                f"{list(expected)}: do config.json and the weights belong together?"
            )
    return None


def _check_names(
    keymap: KeyMap, store: Store, missing: list[str], unread: list[str], unknown: list[str]
) -> None:
    if needed := [name for name in missing if not name.startswith("head.")]:
        name = keymap.source(needed[0]).names[0]
        close = nearest(name, unknown)
        raise MissingKeys(
            f"the checkpoint lacks {name}{_others(needed)}"
            + (f"; the nearest name in it is {close}" if close else "")
            + ": is it of this model class, and complete?"
        )
    if unknown:
        close = nearest(unknown[0], (n for s in store for n in (s,) if s not in unknown))
        raise UnexpectedKeys(
            f"{store.path(unknown[0]).name} holds {unknown[0]}{_others(unknown)}, which is no name of this family"
            + (f"; the nearest is {close}" if close else "")
        )
    if unread:
        raise UnreadKeys(
            f"{store.path(unread[0]).name} holds {unread[0]}{_others(unread)}, for which the config has no place: "
            "it describes a smaller or differently built model"
        )


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
