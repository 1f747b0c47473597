"""Headers of safetensors files, read with validation and written.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes. The header maps each
name to `{"dtype", "shape", "data_offsets": [begin, end]}`; offsets count from the header's end and must cover the rest
of the file without holes or overlaps. `__metadata__` maps strings to strings. Source:
https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

from monoblock.errors import CheckpointError
from monoblock.field_types import brief

# Bytes per element, in the order in which the reference writer ranks them (larger ranks are written first).
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "C64": 8,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
_RANK = {name: rank for rank, name in enumerate(ITEM_BYTES)}
_MAX_HEADER = (
    100_000_000  # bytes; the reference reader's limit, against huge allocations for a corrupt length
)

_MAX_AXES, _MAX_COUNT = 64, 2**63 - 1
_PAIRS = 10_000  # limit on entries in addition to those of the tensors

# Other files that are commonly found under the name of a weight file, by their first bytes.
_NOT_WEIGHTS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights: run `git lfs pull` in its folder"),
    (b"<!doctype html", "is a web page, not the weights: download the file itself"),
    (b"<html", "is a web page, not the weights: download the file itself"),
)


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of a file: its dtype (safetensors name), its shape, and the offsets of its bytes from the file's
    start. `rest`: the offsets of further chunks, in formats that store a large tensor in several."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    rest: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Header:
    """A file's tensors by name, in the order of their offsets, and its metadata."""

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def check_weight_file(path: Path) -> int:
    """The size in bytes of a weight file. CheckpointError: it is missing, empty or a known placeholder."""
    try:
        with path.open("rb") as file:
            head = file.read(32)
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist: the checkpoint is incomplete, fetch it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not size:
        raise CheckpointError(f"{path} is empty: the download or save was interrupted; fetch it again")
    for prefix, meaning in _NOT_WEIGHTS:
        if head.lower().startswith(prefix):
            raise CheckpointError(f"{path} {meaning}")
    return size


def read_header(path: Path) -> Header:
    """The validated header of a safetensors file; `CheckpointError` names the file and the fault."""
    size = check_weight_file(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            if size >= 8 and length <= _MAX_HEADER:
                raise _truncated(path, 8 + length, size)
            raise CheckpointError(
                f"{path} is not a safetensors file: its first 8 bytes are no valid header length"
            )
        raw = file.read(length)
    _check_structure(path, raw)
    try:
        table: object = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file: its header is not valid JSON ({error})"
        ) from error
    if not isinstance(table, dict):
        raise CheckpointError(
            f"{path} is not a safetensors file: its header is a JSON {type(table).__name__}"
        )
    fields = cast(dict[str, Any], table)
    metadata: object = fields.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(
        isinstance(v, str) for v in cast(dict[str, Any], metadata).values()
    ):
        raise CheckpointError(f"{path} has a broken header: __metadata__ must map strings to strings")
    entries = [(name, _entry(path, name, field, 8 + length)) for name, field in fields.items()]
    entries.sort(key=lambda item: (item[1].begin, item[1].end))
    _check_layout(path, entries, 8 + length, size)
    return Header(entries=dict(entries), metadata=cast(dict[str, str], metadata))


def _check_structure(path: Path, raw: bytes) -> None:
    """CheckpointError for a header with more objects, lists or pairs than its tensors account for: parsing them would
    take up to thirty times its size in memory."""
    tensors = raw.count(b'"data_offsets"')
    lists, objects, pairs = raw.count(b"["), raw.count(b"{"), raw.count(b'":') + raw.count(b'" :')
    if lists > 2 * tensors + _PAIRS or objects > tensors + _PAIRS or pairs > 4 * tensors + _PAIRS:
        raise CheckpointError(f"{path} has a broken header: it is no table of tensors")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _entry(path: Path, name: str, field: object, start: int) -> TensorEntry:
    values = cast(dict[str, Any], field) if isinstance(field, dict) else {}
    dtype, shape, offsets = values.get("dtype"), values.get("shape"), values.get("data_offsets")
    if (
        not isinstance(dtype, str)
        or not _counts(shape)
        or not _counts(offsets)
        or len(cast(list[int], offsets)) != 2
    ):
        raise CheckpointError(
            f"{path} has a broken header: tensor {brief(name)} lacks a proper dtype, shape or data_offsets"
        )
    if dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{path}: tensor {brief(name)} has dtype {brief(dtype)}, which is not supported; known are "
            f"{', '.join(ITEM_BYTES)}"
        )
    begin, end = cast(tuple[int, int], offsets)
    expected = prod(cast(list[int], shape)) * ITEM_BYTES[dtype]
    if end - begin != expected:
        raise CheckpointError(
            f"{path} has a broken header: tensor {brief(name)} of {dtype} {shape} needs {expected} bytes, "
            f"its data_offsets {offsets} give {end - begin}"
        )
    return TensorEntry(dtype=dtype, shape=tuple(cast(list[int], shape)), begin=start + begin, end=start + end)


def _counts(value: object) -> bool:
    """Whether `value` is a list of at most 64 non-negative integers (JSON's true is none)."""
    if not isinstance(value, list) or len(cast(list[object], value)) > _MAX_AXES:
        return False
    return all(type(n) is int and 0 <= n <= _MAX_COUNT for n in cast(list[object], value))


def _check_layout(path: Path, entries: list[tuple[str, TensorEntry]], start: int, size: int) -> None:
    offset = start
    for name, entry in entries:
        if entry.begin != offset:
            fault = "overlaps the tensor before it" if entry.begin < offset else "leaves a hole before it"
            raise CheckpointError(f"{path} has a broken header: tensor {brief(name)} {fault}")
        offset = entry.end
    if offset > size:
        raise _truncated(path, offset, size)
    if offset < size:
        raise CheckpointError(f"{path} has {size - offset} bytes after its last tensor: the file is corrupt")


def _truncated(path: Path, expected: int, size: int) -> CheckpointError:
    return CheckpointError(f"{path} is truncated: {size} bytes of {expected}; fetch it again")


def make_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, list[str]]:
    """The header of a file that holds `(name, dtype, shape)` tensors, as bytes, and the order in which to write them.

    Wide dtypes come first, so that every tensor is aligned to its element size without padding.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    order: list[str] = []
    for name, dtype, shape in sorted(tensors, key=lambda tensor: (-_RANK[tensor[1]], tensor[0])):
        end = offset + prod(shape) * ITEM_BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        order.append(name)
        offset = end
    raw = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, order
