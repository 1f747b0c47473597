"""Check that a PyTorch file holds all of its storages, by scanning its pickle's opcodes without executing them.

PyTorch maps a storage from the start of its record with the length given in the pickle, so that a truncated or
compressed record would give arbitrary bytes. Formats: a zip archive with `data.pkl` and one record per storage (torch
1.6 and later), or consecutive pickles followed by the storages' bytes.
"""

import io
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from monoblock.checkpoint.header import check_weight_file
from monoblock.errors import CheckpointError

MAX_PICKLE = 32 * 2**20  # bytes; the pickle of a checkpoint of 1,000 tensors has 0.2 MB
MAX_OPCODES = 2_000_000  # a checkpoint of 1,000 tensors has 40,000
_LOCAL_HEADER, _DESCRIPTOR = (
    30,
    24,
)  # bytes of a zip record's local header, and the maximum of its data descriptor

_ITEM_BYTES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage", "QInt32Storage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("CharStorage", "ByteStorage", "BoolStorage", "UntypedStorage"), 1),
    **dict.fromkeys(("QInt8Storage", "QUInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage"), 1),
    "ComplexDoubleStorage": 16,
}


@dataclass(frozen=True)
class _Global:
    """A class or function named in a pickle."""

    name: str


class _Mark:
    """The MARK object on the pickle machine's stack."""


class _Other:
    """Any value that is irrelevant to storages."""


_MARK, _OTHER = _Mark(), _Other()


def check_storages(path: Path) -> None:
    """CheckpointError unless the file holds every storage it refers to, complete and uncompressed.

    ValueError: it is no PyTorch file; `torch.load` gives the better error message.
    """
    size = check_weight_file(path)
    if is_archive(path):
        _check_archive(path)
        return
    with path.open("rb") as file:
        stream = io.BytesIO(file.read(MAX_PICKLE))
    needed: dict[str, int] = {}
    for _ in range(4):  # magic number, protocol version, system information, content
        needed |= dict(_storages(stream, size))
    if sum(needed.values()) > size:
        raise CheckpointError(
            f"{path} is truncated: its storages need {sum(needed.values()):,} bytes, it has {size:,}; fetch it again"
        )


def is_archive(path: Path) -> bool:
    """Whether a file is a zip archive, damaged or not. OSError: it cannot be read."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            records = _records(path, archive, file)
            pickles = [name for name in records if name.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1 or records[pickles[0]] > MAX_PICKLE:
                raise ValueError("it has no data.pkl, or more than one, or too large a one")
            content = archive.read(pickles[0])
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, RuntimeError) as error:
        raise CheckpointError(f"{path} is a damaged zip archive ({error}): fetch it again") from error
    folder = pickles[0].removesuffix("data.pkl")
    for key, count in _storages(io.BytesIO(content), path.stat().st_size):
        stored = records.get(f"{folder}data/{key}")
        if stored != count:
            found = "is missing" if stored is None else f"has {stored:,}"
            raise CheckpointError(
                f"{path} is damaged: the storage {key!r} needs {count:,} bytes and {found}; fetch it again"
            )


def _records(path: Path, archive: zipfile.ZipFile, file: Any) -> dict[str, int]:
    """Record name -> size. CheckpointError if a record is compressed or overlaps the next one."""
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    ends = [info.header_offset for info in infos[1:]] + [archive.start_dir]
    records: dict[str, int] = {}
    for info, end in zip(infos, ends, strict=True):
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise CheckpointError(
                f"{path} is refused: its record {info.filename} is compressed or encrypted, as PyTorch never writes it"
            )
        file.seek(info.header_offset)
        head = file.read(_LOCAL_HEADER)
        begin = info.header_offset + _LOCAL_HEADER
        begin += int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        whole = info.file_size == info.compress_size and info.filename not in records
        if not whole or not 0 <= end - (begin + info.file_size) <= _DESCRIPTOR:
            raise CheckpointError(
                f"{path} is damaged: its record {info.filename} is truncated; fetch it again"
            )
        records[info.filename] = info.file_size
    return records


def _storages(stream: io.BytesIO, size: int) -> Iterator[tuple[str, int]]:
    """Keys and sizes of the storages in the next pickle of a file of `size` bytes; ValueError: it is no pickle."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    try:
        for step, (op, arg, _) in enumerate(pickletools.genops(stream)):
            if step > MAX_OPCODES:
                raise CheckpointError(
                    f"its pickle has over {MAX_OPCODES:,} opcodes, more than any checkpoint"
                )
            if op.name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[arg] = stack[-1]
            elif op.name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif op.name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[arg])
            elif op.name == "MARK":
                stack.append(_MARK)
            else:
                items = _popped(stack, op)
                if op.name in ("BINPERSID", "PERSID"):
                    yield _storage(items[0] if items else arg)
                elif op.name == "REDUCE":
                    _check_call(items, size)
                stack += _pushed(op, arg, items)
    except (IndexError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__})") from error


def _popped(stack: list[Any], op: Any) -> list[Any]:
    """Pop the operands of an opcode from the stack, without the mark."""
    before = list(op.stack_before)
    if pickletools.markobject not in before:
        cut = len(stack) - len(before)
        if cut < 0:
            raise IndexError("an empty stack")
        items, stack[cut:] = stack[cut:], []
        return items
    at = len(stack) - 1
    while stack[at] is not _MARK:  # IndexError where there is none
        at -= 1
    items, stack[at:] = stack[at + 1 :], []
    ahead = before.index(pickletools.markobject)
    if ahead:
        items, stack[-ahead:] = [*stack[-ahead:], *items], []
    return items


def _pushed(op: Any, arg: Any, items: list[Any]) -> list[Any]:
    """The values that an opcode pushes."""
    if op.name in ("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
        return [tuple(items)]
    if op.name == "GLOBAL":
        return [_Global(str(arg).replace(" ", "."))]
    if op.name == "STACK_GLOBAL":
        return [_Global(f"{items[0]}.{items[1]}")]
    if op.name == "DUP":
        return [items[0], items[0]]
    if not op.stack_before and arg is not None:
        return [arg]
    return [_OTHER for _ in op.stack_after]


def _storage(given: Any) -> tuple[str, int]:
    """The key and the size in bytes of a persistent id: ("storage", class, key, device, elements, ...)."""
    values = cast("tuple[Any, ...]", given)
    if not isinstance(given, tuple) or len(values) < 5 or values[0] != "storage":
        raise ValueError("it has a persistent id that is no storage")
    kind, key, count = values[1], values[2], values[4]
    name = kind.name.rpartition(".")[2] if isinstance(kind, _Global) else ""
    if name not in _ITEM_BYTES or not isinstance(key, str) or type(count) is not int or count < 0:
        raise ValueError(f"it has a storage of unknown type {name!r}")
    return key, count * _ITEM_BYTES[name]


def _check_call(items: list[Any], size: int) -> None:
    """ValueError for a call that allocates more memory than the file has bytes (`bytearray(n)`)."""
    function, arguments = items
    if (
        isinstance(function, _Global)
        and function.name.endswith(".bytearray")
        and isinstance(arguments, tuple)
    ):
        values = cast("tuple[Any, ...]", arguments)
        if any(isinstance(value, int) and value > size for value in values):
            raise ValueError("it allocates more memory than the file holds")
