"""PyTorch's pickled files, read without running anything that they ask for."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from monoblock.checkpoint.array_adapters import import_torch
from monoblock.checkpoint.header import check_weight_file
from monoblock.checkpoint.pickle_scan import check_storages, is_archive
from monoblock.errors import CheckpointError
from monoblock.field_types import brief

# How `torch.load` names what a pickle wants to call.
_FOREIGN = re.compile(r"GLOBAL ([\w.]+)")

_MOST_ENTRIES = 1_000_000  # of nested dicts


class StandIn:
    """What a training checkpoint's foreign objects become: it holds nothing and does nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def unpickled(path: Path, *, stand_ins: bool = False) -> object:
    """A pickled file's content; mapped into memory if it is of the zip kind (torch 1.6 and later), else read whole.

    Only tensors and plain containers are made (`weights_only=True`). A file that holds anything else is refused,
    or, with `stand_ins`, each foreign class or function in it is replaced by `StandIn`: no foreign code is
    imported or called either way. `CheckpointError` says what is wrong with the file; a storage that is cut off or
    compressed is one such thing.
    """
    torch = import_torch(f"reading {path.name}")
    check_weight_file(path)
    zipped = is_archive(path)
    unsure: ValueError | None = None
    try:
        check_storages(path)
    except CheckpointError:
        raise
    except ValueError as error:
        unsure = error  # PyTorch mostly says better what is wrong
    try:
        names: list[str] = (
            torch.serialization.get_unsafe_globals_in_checkpoint(path) if stand_ins and zipped else []
        )
        with torch.serialization.safe_globals([(StandIn, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
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
    if unsure is not None:
        raise CheckpointError(f"{path} cannot be read as PyTorch weights ({unsure}): fetch it again")
    return content


def plain_tensor(name: str, value: Any, path: Path) -> Any:
    """A tensor of a pickle as a plain one, without gradients, over the same memory.

    `CheckpointError`: it has no numbers of its own in the file (meta, sparse, quantised, or one number that stands for
    many).
    """
    torch = import_torch(f"reading {path.name}")
    dense = isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized
    if not dense or value.device.type != "cpu":
        raise CheckpointError(f"{path}: {brief(name)} is no plain tensor: save it dense, on the CPU")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: {brief(name)} of {list(value.shape)} needs more than the {value.untyped_storage().nbytes():,} "
            "bytes that are stored for it"
        )
    return value.detach()


def flat_tensors(content: object, path: Path) -> dict[str, Any]:
    """The tensors of nested dicts, by their keys joined with dots; `CheckpointError` if anything else is there."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a dict of tensors")
    torch = import_torch(f"reading {path.name}")
    found: dict[str, Any] = {}
    rest: list[tuple[str, object]] = [("", content)]
    for _ in range(_MOST_ENTRIES):
        if not rest:
            return found
        name, value = rest.pop()
        if isinstance(value, Mapping):
            inner = cast(Mapping[object, object], value)
            rest += reversed([(f"{name}.{key}" if name else str(key), item) for key, item in inner.items()])
        elif isinstance(value, torch.Tensor):
            found[name] = plain_tensor(name, value, path)
        elif value is not None:
            raise CheckpointError(
                f"{path}: entry {brief(name)} is a {type(value).__name__}; expected tensors only"
            )
    raise CheckpointError(f"{path} holds over {_MOST_ENTRIES:,} entries, or itself: it is no model's")
