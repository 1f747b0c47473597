"""Read the structure of Flax's msgpack files: nested maps whose leaves are arrays, located by offset and not read.

An array is an extension of type 1 (a NumPy scalar: type 3) whose data is itself msgpack: shape, dtype name and bytes.
An array of more than 2^30 bytes is a map with `__msgpack_chunked_array__`, its `shape` and its flat `chunks`, both as
maps with keys "0", "1", ... Format: https://github.com/msgpack/msgpack/blob/master/spec.md.
"""

import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import cast

from monoblock.checkpoint.array_adapters import SAFETENSORS_DTYPES
from monoblock.checkpoint.header import ITEM_BYTES, Header, TensorEntry, check_weight_file
from monoblock.errors import CheckpointError
from monoblock.field_types import brief

CHUNKED = "__msgpack_chunked_array__"

_ARRAYS = (1, 3)  # Flax's extension types of an array and of a NumPy scalar
_DEPTH = 64  # limit on nesting, far above any parameter tree
_VALUES = 1_000_000  # limit on all values; a model of 100 layers has some 20,000
_AXES, _COUNT = 64, 2**63 - 1


@dataclass(frozen=True)
class _Span:
    """A byte range of the file."""

    begin: int
    end: int


def read_msgpack(path: Path) -> Header:
    """The arrays of a msgpack file by their path in its tree, joined with dots; array data is not read.

    `CheckpointError` names the file and what is wrong with it.
    """
    check_weight_file(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data)
        try:
            tree = reader.value()
            if reader.at != len(data):
                raise ValueError(f"{len(data) - reader.at} bytes follow its end")
            entries = dict(_no_duplicates(_flat(tree, "")))
        except ValueError as error:
            raise CheckpointError(
                f"{path} cannot be read as Flax's msgpack weights ({error}): fetch it again"
            ) from error
    if not entries:
        raise CheckpointError(f"{path} holds no arrays: fetch it again")
    return Header(entries=entries, metadata={})


class _Reader:
    """A msgpack parser with a cursor. ValueError: the bytes are not msgpack, or truncated."""

    def __init__(self, data: mmap.mmap):
        self.at = 0
        self._data = data
        self._depth = self._values = 0

    def value(self) -> object:
        """The next value: strings, numbers, lists and dicts as such, byte strings as spans, arrays as entries."""
        self._values += 1
        if self._values > _VALUES:
            raise ValueError(f"it holds over {_VALUES:,} values, more than any model")
        tag = self.number(1)
        if tag < 0x80:
            return tag
        if tag < 0x90:
            return self.table(tag & 0x0F)
        if tag < 0xA0:
            return self.values(tag & 0x0F)
        if tag < 0xC0:
            return self.text(tag & 0x1F)
        if tag >= 0xE0:
            return tag - 0x100
        if tag not in _TAGS:
            raise ValueError(f"byte {self.at - 1} is no msgpack tag")
        return _TAGS[tag](self)

    def span(self, length: int) -> _Span:
        """The range of the next bytes, which are skipped."""
        self._need(length)
        begin, self.at = self.at, self.at + length
        return _Span(begin, self.at)

    def _need(self, length: int) -> None:
        """ValueError unless `length` bytes are left."""
        if length > len(self._data) - self.at:
            raise ValueError(f"it is truncated: {len(self._data)} bytes, of at least {self.at + length}")

    def raw(self, length: int) -> bytes:
        """The next bytes."""
        span = self.span(length)
        return self._data[span.begin : span.end]

    def number(self, length: int, *, signed: bool = False) -> int:
        """A big-endian integer of `length` bytes."""
        return int.from_bytes(self.raw(length), "big", signed=signed)

    def text(self, length: int) -> str:
        """UTF-8 text; UnicodeDecodeError is a ValueError."""
        return self.raw(length).decode()

    def values(self, count: int) -> list[object]:
        """`count` values, each of at least one byte."""
        self._need(count)
        return [self._inner() for _ in range(count)]

    def table(self, count: int) -> dict[str, object]:
        """A map of `count` string keys and values, each pair of at least two bytes."""
        self._need(2 * count)
        found: dict[str, object] = {}
        for _ in range(count):
            key = self._inner()
            if not isinstance(key, str) or key in found:
                raise ValueError(
                    f"a map before byte {self.at} has a duplicate or non-string key {brief(key)}"
                )
            found[key] = self._inner()
        return found

    def extension(self, length: int) -> object:
        """The entry of an array, or the span of an extension of another type."""
        kind = self.number(1)
        if kind not in _ARRAYS:
            return self.span(length)
        end = self.at + length
        fields = self._inner()
        if isinstance(fields, list) and self.at == end and len(cast(list[object], fields)) == 3:
            shape, dtype, span = cast(list[object], fields)
            if isinstance(shape, list) and isinstance(dtype, str) and isinstance(span, _Span):
                return _entry(cast(list[object], shape), dtype, span)
        raise ValueError(f"the extension before byte {end} is no Flax array")

    def _inner(self) -> object:
        self._depth += 1
        if self._depth > _DEPTH:
            raise ValueError(f"its tree is more than {_DEPTH} levels deep")
        value = self.value()
        self._depth -= 1
        return value


def _sized(read: Callable[[_Reader, int], object], length: int) -> Callable[[_Reader], object]:
    """A reader of a value that is preceded by its size in `length` bytes."""
    return lambda reader: read(reader, reader.number(length))


def _number(length: int, *, signed: bool = False) -> Callable[[_Reader], object]:
    return lambda reader: reader.number(length, signed=signed)


def _float(code: str) -> Callable[[_Reader], object]:
    return lambda reader: struct.unpack(code, reader.raw(struct.calcsize(code)))[0]


def _extension(length: int) -> Callable[[_Reader], object]:
    return lambda reader: reader.extension(length)


# Readers by tag, for the tags that do not contain the value or its size.
_TAGS: dict[int, Callable[[_Reader], object]] = {
    0xC0: lambda _: None,
    0xC2: lambda _: False,
    0xC3: lambda _: True,
    0xCA: _float(">f"),
    0xCB: _float(">d"),
    **{0xCC + i: _number(1 << i) for i in range(4)},
    **{0xD0 + i: _number(1 << i, signed=True) for i in range(4)},
    **{0xD4 + i: _extension(1 << i) for i in range(5)},
    **{0xC4 + i: _sized(_Reader.span, 1 << i) for i in range(3)},
    **{0xC7 + i: _sized(_Reader.extension, 1 << i) for i in range(3)},
    **{0xD9 + i: _sized(_Reader.text, 1 << i) for i in range(3)},
    **{0xDC + i: _sized(_Reader.values, 2 << i) for i in range(2)},
    **{0xDE + i: _sized(_Reader.table, 2 << i) for i in range(2)},
}


def _entry(shape: list[object], dtype: str, span: _Span) -> TensorEntry:
    if dtype not in SAFETENSORS_DTYPES:
        raise ValueError(f"an array has dtype {brief(dtype)}, which is not supported")
    sizes = _sizes(shape)
    if sizes is None or span.end - span.begin != prod(sizes) * ITEM_BYTES[SAFETENSORS_DTYPES[dtype]]:
        raise ValueError(f"an array of {dtype} {brief(shape)} has {span.end - span.begin} bytes")
    return TensorEntry(dtype=SAFETENSORS_DTYPES[dtype], shape=sizes, begin=span.begin, end=span.end)


def _sizes(shape: list[object]) -> tuple[int, ...] | None:
    """The sizes of a shape; None if it is not valid."""
    sizes = tuple(n for n in shape[: _AXES + 1] if type(n) is int and 0 <= n <= _COUNT)
    return sizes if len(sizes) == len(shape) <= _AXES else None


def _flat(node: object, name: str) -> Iterator[tuple[str, TensorEntry]]:
    """The arrays in a subtree, by name."""
    if isinstance(node, TensorEntry):
        yield name or "array", node
    elif not isinstance(node, dict):
        raise ValueError(f"{brief(name)} is no array, but of type {type(node).__name__}")
    elif CHUNKED in node:
        yield name, _joined(cast(dict[str, object], node), name)
    else:
        for key, inner in cast(dict[str, object], node).items():
            yield from _flat(inner, f"{name}.{key}".lstrip("."))


def _joined(node: Mapping[str, object], name: str) -> TensorEntry:
    """The entry of a chunked array."""
    chunks, shape = _counted(node.get("chunks")), _counted(node.get("shape"))
    arrays = [chunk for chunk in chunks if isinstance(chunk, TensorEntry)]
    sizes = _sizes(shape)
    if not arrays or sizes is None or len(arrays) < len(chunks) or len({array.dtype for array in arrays}) > 1:
        raise ValueError(f"the chunks of {brief(name)} form no array")
    if sum(prod(array.shape) for array in arrays) != prod(sizes):
        raise ValueError(f"the chunks of {brief(name)} do not fill the shape {list(sizes)}")
    first, *rest = arrays
    rest_ranges = tuple((array.begin, array.end) for array in rest)
    return TensorEntry(dtype=first.dtype, shape=sizes, begin=first.begin, end=first.end, rest=rest_ranges)


def _counted(node: object) -> list[object]:
    """The values of a map with keys "0", "1", ..., in that order."""
    table = cast(dict[str, object], node) if isinstance(node, dict) else {}
    return [table.get(str(i)) for i in range(len(table))]


def _no_duplicates(pairs: Iterator[tuple[str, TensorEntry]]) -> Iterator[tuple[str, TensorEntry]]:
    seen: set[str] = set()
    for name, entry in pairs:
        if name in seen:
            raise ValueError(f"{brief(name)} occurs twice")
        seen.add(name)
        yield name, entry
