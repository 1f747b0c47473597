"""Writing safetensors checkpoints: one file or shards with an index, whole or not at all."""

import json
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from monoblock.checkpoint.array_adapters import Adapter, Description, Framework, adapter
from monoblock.checkpoint.fingerprint import FINGERPRINTS, fingerprint
from monoblock.checkpoint.header import ITEM_BYTES, make_header
from monoblock.checkpoint.transaction import SAVE_ID, Staging, staged
from monoblock.errors import CheckpointError

SINGLE = "model.safetensors"

# Weight files of an earlier save, which would speak against the new ones. Variants and other files stay.
_STALE = re.compile(
    r"(model(-\d{5}-of-\d{5})?\.safetensors|pytorch_model(-\d{5}-of-\d{5})?\.bin)(\.index\.json)?"
)

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b", re.IGNORECASE)

_CHUNK = 64 * 2**20  # bytes handed to the disk at once


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
    """A tensor that is made when it is written, and whose dtype (the hub's name) and shape are known before."""

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
    """Fill shards in the tensors' order, as the hub's libraries do; a tensor beyond the limit goes alone."""
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
    beside: Mapping[str, str] | None = None,
    variant: str | None = None,
) -> list[Path]:
    """Write `tensors` under the hub's file names; returns the files, the index last if there is one.

    A value is a tensor (torch for "pt", NumPy for "np"), or a function of no arguments that makes it; such a
    function is called twice (a `LazyTensor` once) and its tensor is dropped at once, so no more than one made tensor
    exists at a time. Memory beyond the tensors given is one tensor at most: none for what lies contiguous on the CPU.

    Tensors that are the same memory (tied weights) are written once, under the first of their names; the
    file's metadata maps the other names to it. `metadata` defaults to `{"format": "pt"}`, which transformers
    asks for.

    `beside`: further files of the checkpoint, name -> text (config.json), put in place together with the weights.
    `variant`: "fp16" names the file model.fp16.safetensors, beside which files of other variants stay.
    `folder` may be a `Staging` of the caller's, who adds other files and commits it.

    It is one transaction (`transaction.py`): the folder holds all of the new files or all of an earlier save's, and
    weight files of that which are not part of this one go. Shards and their index have an id of the save, so that a
    mixture that another program made is told. `CheckpointError`: the folder cannot be written, the disk is full, a
    value is no tensor or has a dtype that the format lacks. `ValueError`: `max_shard_size` makes no sense.
    """
    notes = _checked(metadata if metadata is not None else {"format": "pt"})
    side = adapter(framework)
    described, ties = _describe(side, tensors)

    def write(file: BinaryIO, part: Mapping[str, Description], more: Mapping[str, str]) -> None:
        _write(file, side, tensors, part, {**ties, **notes, **more})

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
        beside=beside,
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
    beside: Mapping[str, str] | None,
    metadata: bool = False,
) -> list[Path]:
    """What `save_tensors` does, in any format: `write` puts tensors of these descriptions into a file, and, if the
    format has a field for it, `metadata`. For a format without (`metadata=False`), the index has fingerprints of the
    shards instead.

    `single` is the name of a file that holds all; those of shards and their `index` follow from it. `stale` matches
    the names of such files as go when the new ones are in place.
    """
    shards = _plan(described, parse_size(max_shard_size))
    count = len(shards)
    names = [single] if count == 1 else [_shard_name(single, i, count) for i in range(1, count + 1)]
    # A file alone has nothing that it could be mixed with, and the same weights give the same file.
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
        for name, text in (beside or {}).items():
            stage.write(name, text)
        stage.remove(stale)
    place = folder.folder if isinstance(folder, Staging) else Path(folder)
    return [place / name for name in names]


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


def _describe(side: Adapter, tensors: Mapping[str, Any]) -> tuple[dict[str, Description], dict[str, str]]:
    """What to write, and for each name that is tied to an earlier one, that one."""
    described: dict[str, Description] = {}
    ties: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    kept: list[Any] = []  # an address names a tensor only while the tensor lives
    for name, value in tensors.items():
        if name == "__metadata__":
            raise CheckpointError("a tensor cannot be called '__metadata__': safetensors keep that name")
        if isinstance(value, LazyTensor):
            description = Description(dtype=value.dtype, shape=value.shape, identity=None)
        else:
            description = side.describe(name, made(value))
        identity = None if callable(value) else description.identity
        kept.append(value)
        owner = first.setdefault(identity, name) if identity else name
        if owner == name:
            described[name] = description
        else:
            ties[name] = owner
    return described, ties


def made(value: Any | Callable[[], Any]) -> Any:
    """A tensor, or what makes it, as the tensor."""
    return value() if callable(value) else value


def _write(
    file: BinaryIO,
    side: Adapter,
    tensors: Mapping[str, Any],
    part: Mapping[str, Description],
    notes: Mapping[str, str],
) -> None:
    head, order = make_header([(n, d.dtype, d.shape) for n, d in part.items()], notes)
    file.write(head)
    for name in order:
        raw = side.raw(made(tensors[name]))
        expected = prod(part[name].shape) * ITEM_BYTES[part[name].dtype]
        if len(raw) != expected:
            raise CheckpointError(
                f"tensor '{name}' was made with {len(raw)} bytes, but announced with {expected}"
            )
        write_bytes(file, raw)
        del raw  # before the next tensor is made


def write_bytes(file: BinaryIO, raw: memoryview) -> None:
    """Write a tensor's bytes so that Ctrl-C is heard on the way."""
    for start in range(0, len(raw), _CHUNK):
        file.write(raw[start : start + _CHUNK])


def _index(names: list[str], shards: list[_Shard], notes: Mapping[str, Any]) -> str:
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard.tensors}
    metadata = {"total_size": sum(shard.bytes for shard in shards), **notes}
    index = {"metadata": metadata, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
