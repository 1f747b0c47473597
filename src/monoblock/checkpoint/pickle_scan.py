"""What a PyTorch file says of its storages, read without unpickling it, and whether the file holds them.

PyTorch maps a storage from where its record begins, as long as the pickle says: without these checks a record that is
cut off or compressed gives whatever bytes lie there. Formats: a zip archive with `data.pkl` and a record for each
storage (torch 1.6 and later), or pickles one after the other with the storages' bytes after them.
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

MOST_PICKLE = 32 * 2**20  # bytes; a checkpoint of 1,000 tensors has 0.2 MB beside their numbers
MOST_STEPS = 2_000_000  # opcodes; one of 1,000 tensors takes 40,000
_LOCAL_HEADER, _DESCRIPTOR = (
    30,
    24,
)  # bytes of a zip record's own header, and at most of what follows its data

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
    """A class or function that a pickle names."""

    name: str


class _Mark:
    """Where a list of items begins on the stack."""


class _Other:
    """A value that does not matter here."""


_MARK, _OTHER = _Mark(), _Other()


def check_storages(path: Path) -> None:
    """CheckpointError unless the file holds every storage that it speaks of, whole and as it is.

    ValueError: it is no such file, and PyTorch will say why.
    """
    size = check_weight_file(path)
    if is_archive(path):
        _check_archive(path)
        return
    with path.open("rb") as file:
        stream = io.BytesIO(file.read(MOST_PICKLE))
    needed: dict[str, int] = {}
    for _ in range(4):  # a magic number, the version, the machine, and the content
        needed |= dict(_storages(stream, size))
    if sum(needed.values()) > size:
        raise CheckpointError(
            f"{path} is cut off: its storages need {sum(needed.values()):,} bytes of {size:,}, fetch it again"
        )


def is_archive(path: Path) -> bool:
    """Whether a file is a zip archive, be it a damaged one. OSError: it cannot be read."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            records = _records(path, archive, file)
            pickles = [name for name in records if name.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1 or records[pickles[0]] > MOST_PICKLE:
                raise ValueError("it has no data.pkl, or more than one, or too large a one")
            content = archive.read(pickles[0])
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, RuntimeError) as error:
        raise CheckpointError(f"{path} is a damaged zip archive ({error}): fetch it again") from error
    folder = pickles[0].removesuffix("data.pkl")
    for key, count in _storages(io.BytesIO(content), path.stat().st_size):
        stored = records.get(f"{folder}data/{key}")
        if stored != count:
            found = "is not there" if stored is None else f"has {stored:,}"
            raise CheckpointError(
                f"{path} is damaged: the storage {key!r} needs {count:,} bytes and {found}; fetch it again"
            )


def _records(path: Path, archive: zipfile.ZipFile, file: Any) -> dict[str, int]:
    """The archive's records and their bytes; none may be compressed, or reach into the next."""
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    ends = [info.header_offset for info in infos[1:]] + [archive.start_dir]
    records: dict[str, int] = {}
    for info, end in zip(infos, ends, strict=True):
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise CheckpointError(
                f"{path} is refused: its record {info.filename} is compressed or encrypted, which PyTorch's never are"
            )
        file.seek(info.header_offset)
        head = file.read(_LOCAL_HEADER)
        begin = info.header_offset + _LOCAL_HEADER
        begin += int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        whole = info.file_size == info.compress_size and info.filename not in records
        if not whole or not 0 <= end - (begin + info.file_size) <= _DESCRIPTOR:
            raise CheckpointError(f"{path} is damaged: its record {info.filename} is cut off; fetch it again")
        records[info.filename] = info.file_size
    return records


def _storages(stream: io.BytesIO, size: int) -> Iterator[tuple[str, int]]:
    """Keys and bytes of the storages that the next pickle of a file of `size` bytes names; ValueError: it is none."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    try:
        for step, (op, arg, _) in enumerate(pickletools.genops(stream)):
            if step > MOST_STEPS:
                raise CheckpointError("its pickle never ends, or holds far more than tensors: it is refused")
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
    """Take what an opcode takes off the stack, but for a mark."""
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
    """What an opcode puts on the stack."""
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
    """The key and the bytes of a persistent id: ("storage", class, key, device, elements, ...)."""
    values = cast("tuple[Any, ...]", given)
    if not isinstance(given, tuple) or len(values) < 5 or values[0] != "storage":
        raise ValueError("it refers to something that is no storage")
    kind, key, count = values[1], values[2], values[4]
    name = kind.name.rpartition(".")[2] if isinstance(kind, _Global) else ""
    if name not in _ITEM_BYTES or not isinstance(key, str) or type(count) is not int or count < 0:
        raise ValueError(f"it has a storage of the kind {name!r}")
    return key, count * _ITEM_BYTES[name]


def _check_call(items: list[Any], size: int) -> None:
    """ValueError for a call whose arguments say how much memory it takes."""
    function, arguments = items
    if (
        isinstance(function, _Global)
        and function.name.endswith(".bytearray")
        and isinstance(arguments, tuple)
    ):
        values = cast("tuple[Any, ...]", arguments)
        if any(isinstance(value, int) and value > size for value in values):
            raise ValueError("it makes up memory that the file does not hold")
