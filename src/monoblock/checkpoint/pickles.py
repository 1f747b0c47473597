"""Read PyTorch's pickled files without executing code from them."""

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

# How errors of `torch.load` name a global that a pickle refers to.
_FOREIGN = re.compile(r"GLOBAL ([\w.]+)")

_MAX_ENTRIES = 1_000_000  # of nested dicts


class StandIn:
    """An inert replacement for the foreign objects of training checkpoints."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def unpickled(path: Path, *, stand_ins: bool = False) -> object:
    """The content of a pickled file: memory-mapped if it is a zip archive (torch 1.6 and later), else read into memory.

    Only tensors and plain containers are created (`weights_only=True`). A file with other objects is refused, unless
    `stand_ins` replaces each foreign class or function by `StandIn`; in either case no foreign code is imported or
    called. `CheckpointError`: the file is damaged, refused, or has truncated or compressed storages.
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
        unsure = error  # raised below if torch.load, whose errors are better, does not fail
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
                f"{path} is refused: it holds code or foreign objects ({foreign[1]}), not only tensors; "
                "use a safetensors version of it, or fetch it again if it may be damaged"
            ) from error
        # the last line without a link: torch puts advice first
        lines = [line for line in str(error).splitlines() if line.strip() and "torch.load" not in line]
        reason = lines[-1].strip() if lines else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as PyTorch weights ({reason}): fetch it again"
        ) from error
    if unsure is not None:
        raise CheckpointError(f"{path} cannot be read as PyTorch weights ({unsure}): fetch it again")
    return content


def plain_tensor(name: str, value: Any, path: Path) -> Any:
    """A tensor of a pickle, detached, over the same memory.

    `CheckpointError`: the file does not store all of its elements (meta, sparse, quantised or expanded tensors).
    """
    torch = import_torch(f"reading {path.name}")
    dense = isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized
    if not dense or value.device.type != "cpu":
        raise CheckpointError(f"{path}: {brief(name)} is no plain tensor: save it dense, on the CPU")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: {brief(name)} of {list(value.shape)} needs more than the {value.untyped_storage().nbytes():,} "
            "bytes stored for it"
        )
    return value.detach()


def flat_tensors(content: object, path: Path) -> dict[str, Any]:
    """The tensors of nested dicts, by keys joined with dots; `CheckpointError` for any other value except None."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a dict of tensors")
    torch = import_torch(f"reading {path.name}")
    found: dict[str, Any] = {}
    rest: list[tuple[str, object]] = [("", content)]
    for _ in range(_MAX_ENTRIES):
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
    raise CheckpointError(f"{path} holds over {_MAX_ENTRIES:,} entries, or refers to itself")
