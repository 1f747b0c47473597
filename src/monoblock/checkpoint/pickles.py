"""PyTorch's pickled files, read without running anything that they ask for."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from monoblock.checkpoint.header import check_weight_file
from monoblock.checkpoint.views import import_torch
from monoblock.errors import CheckpointError

# How `torch.load` names what a pickle wants to call.
_FOREIGN = re.compile(r"GLOBAL ([\w.]+)")


class StandIn:
    """What a training checkpoint's foreign objects become: it holds nothing and does nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def unpickled(path: Path, *, stand_ins: bool = False) -> object:
    """A pickled file's content; mapped into memory if it is of the zip kind (torch 1.6 and later), else read whole.

    Only tensors and plain containers are made (`weights_only=True`). A file that holds anything else is refused,
    or, with `stand_ins`, each foreign class or function in it is replaced by `StandIn`: no foreign code is
    imported or called either way. `CheckpointError` says what is wrong with the file.
    """
    torch = import_torch(f"reading {path.name}")
    check_weight_file(path)
    zipped = zipfile.is_zipfile(path)
    try:
        names: list[str] = (
            torch.serialization.get_unsafe_globals_in_checkpoint(path) if stand_ins and zipped else []
        )
        with torch.serialization.safe_globals([(StandIn, name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError, ... for a damaged file
        foreign = _FOREIGN.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if foreign:
            raise CheckpointError(
                f"{path} is refused: it holds code or foreign objects ({foreign[1]}), not just tensors; "
                "ask its maker for safetensors, or fetch it again if it may be damaged"
            ) from error
        # the last line that is no link: torch puts advice before its reason
        lines = [line for line in str(error).splitlines() if line.strip() and "torch.load" not in line]
        reason = lines[-1].strip() if lines else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as PyTorch weights ({reason}): fetch it again"
        ) from error


def without_gradients(tensor: Any) -> Any:
    """A pickled Parameter, or a tensor that was trained, as a plain tensor over the same memory: it can be copied,
    split and joined in place."""
    return tensor.detach() if tensor.requires_grad else tensor


def flat_tensors(content: object, path: Path) -> dict[str, Any]:
    """The tensors of nested dicts, by their keys joined with dots; `CheckpointError` if anything else is there."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a dict of tensors")
    torch = import_torch(f"reading {path.name}")
    found: dict[str, Any] = {}
    for key, value in cast(Mapping[object, object], content).items():
        if isinstance(value, Mapping):
            inner = flat_tensors(cast(object, value), path)
            found.update({f"{key}.{name}": tensor for name, tensor in inner.items()})
        elif isinstance(value, torch.Tensor):
            found[str(key)] = without_gradients(value)
        elif value is not None:
            raise CheckpointError(f"{path}: entry {key!r} is a {type(value).__name__}; expected tensors only")
    return found
