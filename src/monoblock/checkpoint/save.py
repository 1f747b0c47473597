"""Write safetensors checkpoints atomically: one file, or shards with an index."""

import json
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from monoblock.checkpoint.array_adapters import ArrayAdapter, Description, Framework, adapter
from monoblock.checkpoint.fingerprint import FINGERPRINTS, fingerprint
from monoblock.checkpoint.header import ITEM_BYTES, make_header
from monoblock.checkpoint.transaction import SAVE_ID, Staging, staged
from monoblock.errors import CheckpointError

SINGLE = "model.safetensors"

# Weight files of an earlier save, which would conflict with the new ones. Variants and other files stay.
_STALE = re.compile(
    r"(model(-\d{5}-of-\d{5})?\.safetensors|pytorch_model(-\d{5}-of-\d{5})?\.bin)(\.index\.json)?"
)

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b", re.IGNORECASE)

_CHUNK = 64 * 2**20  # bytes per write


def parse_size(size: int | str) -> int:
    """Bytes in `size`: an int, or a string such as "5GB" (10^9), "200MB" or "1GiB" (2^30). `ValueError`
    otherwise."""
    if isinstance(size, str) and (match := _SIZE.fullmatch(size.strip())):
        bytes_ = int(float(match[1]) * (_UNITS | _BINARY_UNITS)[(match[2] or "").lower()])
    elif isinstance(size, int) and not isinstance(size, bool):
        bytes_ = size
    else:
        raise ValueError(
            f'max_shard_size={size!r}: expected bytes as an int, or a string such as "5GB" or "200MiB"'
        )
    if bytes_ <= 0:
        raise ValueError(f"max_shard_size={size!r}: expected at least one byte")
    return bytes_


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor computed when it is written; its dtype (safetensors name) and shape are known in advance."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Any]

    def __call__(self) -> Any:
        return self.make()


@dataclass
class _Shard:
    tensors: dict[str, Description] = field(default_factory=dict[str, Description])
    bytes: int = 0


def _plan(tensors: Mapping[str, Description], limit: int) -> list[_Shard]:
    """Fill shards in the order of the tensors, as huggingface_hub does; a tensor above the limit gets its own shard."""
    full: list[_Shard] = []
    filling = _Shard()
    for name, tensor in tensors.items():
        size = prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        if size > limit:
            full.append(_Shard({name: tensor}, size))
            continue
        if filling.bytes + size > limit:
            full.append(filling)
            filling = _Shard()
        filling.tensors[name] = tensor
        filling.bytes += size
    return full if full and not filling.tensors else [*full, filling]


def save_tensors(
    folder: str | Path | Staging,
    tensors: Mapping[str, Any],
    *,
    framework: Framework,
    max_shard_size: int | str = "50GB",
    metadata: Mapping[str, str] | None = None,
    extra_files: Mapping[str, str] | None = None,
    variant: str | None = None,
) -> list[Path]:
    """Write `tensors` to model.safetensors, or to shards and their index; returns the files, the index last.

    A value is a tensor (torch for "pt", NumPy for "np"), a `LazyTensor`, or a function without arguments that returns
    the tensor. Such a function is called twice (a `LazyTensor` once), and one such tensor exists at a time. At most one
    tensor is copied at a time; contiguous CPU tensors are not copied.

    Tensors that share memory (tied weights) are written once, under the first name; the file's metadata maps the other
    names to it. `metadata` defaults to `{"format": "pt"}`, which transformers requires.

    `extra_files`: further files to commit with the weights, file name -> text (config.json). `variant`: "fp16" writes
    model.fp16.safetensors and keeps the files of other variants. `folder` may be a `Staging`, to which the caller adds
    files and which it commits.

    The save is one transaction (`transaction.py`): the folder holds all the new files or all the old ones, and weight
    files of an earlier save are removed. Shards and their index carry an id of the save, by which a later mixture of
    files is detected. `CheckpointError`: the folder cannot be written, the disk is full, or a value is no tensor or has
    a dtype that safetensors lacks. `ValueError`: invalid `max_shard_size` or `variant`.
    """
    notes = _checked(metadata if metadata is not None else {"format": "pt"})
    arrays = adapter(framework)
    described, ties = _describe(arrays, tensors)

    def write(file: BinaryIO, part: Mapping[str, Description], more: Mapping[str, str]) -> None:
        _write(file, arrays, tensors, part, {**ties, **notes, **more})

    if variant is not None and not re.fullmatch(r"[\w-]+", variant):
        raise ValueError(f"variant={variant!r}: expected letters and digits, such as 'fp16'")
    stem = rf"model\.{variant}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index\.{variant}\.json"
    return save_shards(
        folder,
        described,
        write,
        single=SINGLE if variant is None else f"model.{variant}.safetensors",
        index=f"{SINGLE}.index.json" if variant is None else f"{SINGLE}.index.{variant}.json",
        stale=_STALE if variant is None else re.compile(stem),
        max_shard_size=max_shard_size,
        extra_files=extra_files,
        metadata=True,
    )


def save_shards(
    folder: str | Path | Staging,
    described: Mapping[str, Description],
    write: Callable[[BinaryIO, Mapping[str, Description], Mapping[str, str]], None],
    *,
    single: str,
    index: str | None = None,
    stale: re.Pattern[str],
    max_shard_size: int | str,
    extra_files: Mapping[str, str] | None,
    metadata: bool = False,
) -> list[Path]:
    """`save_tensors` for any format: `write(file, tensors, metadata)` writes the described tensors to one file.

    `metadata`: whether the format can store the save id; if not, the index stores fingerprints of the shards instead.
    `single`: name of the file if there is only one, from which the names of shards and `index` are derived. `stale`
    matches the names of files to remove on commit.
    """
    shards = _plan(described, parse_size(max_shard_size))
    count = len(shards)
    names = [single] if count == 1 else [_shard_name(single, i, count) for i in range(1, count + 1)]
    # A single file needs no save id, and without one the same weights give the same bytes.
    ids = {SAVE_ID: secrets.token_hex(16)} if metadata and count > 1 else {}
    with ExitStack() as stack:
        stage = folder if isinstance(folder, Staging) else stack.enter_context(staged(folder))
        for name, shard in zip(names, shards, strict=True):
            with stage.open(name) as file:
                write(file, shard.tensors, ids)
        if count > 1:
            index = index or f"{single}.index.json"
            prints = (
                {} if metadata else {FINGERPRINTS: {name: fingerprint(stage.files / name) for name in names}}
            )
            stage.write(index, _index(names, shards, {**ids, **prints}))
            names.append(index)
        for name, text in (extra_files or {}).items():
            stage.write(name, text)
        stage.remove(stale)
    target = folder.folder if isinstance(folder, Staging) else Path(folder)
    return [target / name for name in names]


def _checked(metadata: Mapping[str, Any]) -> dict[str, str]:
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise TypeError(
                f"metadata['{key}'] is a {type(value).__name__}: safetensors metadata are strings"
            )
    return dict(metadata)


def _shard_name(single: str, number: int, count: int) -> str:
    stem, suffix = single.rsplit(".", 1)
    return f"{stem}-{number:05}-of-{count:05}.{suffix}"


def _describe(
    arrays: ArrayAdapter, tensors: Mapping[str, Any]
) -> tuple[dict[str, Description], dict[str, str]]:
    """The tensors to write, and tied name -> first name of the same tensor."""
    described: dict[str, Description] = {}
    ties: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    kept: list[Any] = []  # keeps tensors alive, since an address identifies only a living one
    for name, value in tensors.items():
        if name == "__metadata__":
            raise CheckpointError("a tensor cannot be called '__metadata__': safetensors reserves that name")
        if isinstance(value, LazyTensor):
            description = Description(dtype=value.dtype, shape=value.shape, identity=None)
        else:
            description = arrays.describe(name, made(value))
        identity = None if callable(value) else description.identity
        kept.append(value)
        owner = first.setdefault(identity, name) if identity else name
        if owner == name:
            described[name] = description
        else:
            ties[name] = owner
    return described, ties


def made(value: Any | Callable[[], Any]) -> Any:
    """The tensor itself, if `value` is a function that returns one."""
    return value() if callable(value) else value


def _write(
    file: BinaryIO,
    arrays: ArrayAdapter,
    tensors: Mapping[str, Any],
    part: Mapping[str, Description],
    notes: Mapping[str, str],
) -> None:
    head, order = make_header([(n, d.dtype, d.shape) for n, d in part.items()], notes)
    file.write(head)
    for name in order:
        raw = arrays.raw(made(tensors[name]))
        expected = prod(part[name].shape) * ITEM_BYTES[part[name].dtype]
        if len(raw) != expected:
            raise CheckpointError(
                f"tensor '{name}' has {len(raw)} bytes, but its declared shape and dtype need {expected}"
            )
        write_bytes(file, raw)
        del raw  # free it before the next tensor is computed


def write_bytes(file: BinaryIO, raw: memoryview) -> None:
    """Write a tensor's bytes in chunks, so that Ctrl-C is handled in between."""
    for start in range(0, len(raw), _CHUNK):
        file.write(raw[start : start + _CHUNK])


def _index(names: list[str], shards: list[_Shard], notes: Mapping[str, Any]) -> str:
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard.tensors}
    metadata = {"total_size": sum(shard.bytes for shard in shards), **notes}
    index = {"metadata": metadata, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
