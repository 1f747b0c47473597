"""The header of a GGUF file: metadata and the table of tensors, read with validation.

A file is the magic "GGUF", a version, the numbers of tensors and of metadata entries, the entries (key, type, value),
the tensors (name, dimensions with the fastest one first, type, offset), and the tensors' data, each at a multiple of
`general.alignment`. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Every count, length, dimension and offset is checked against the file's size before it is used; the reader of the `gguf`
package trusts them, so it is not used.
"""

import functools
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from monoblock.checkpoint.header import check_weight_file
from monoblock.errors import CheckpointError
from monoblock.field_types import brief

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # if general.alignment is missing

_MOST = 1 << 16  # tensors, and metadata entries; the largest models have some 2,000 and 100
_MOST_KEY = 1 << 16  # bytes of a key, as in the specification
_MOST_NAME = 256  # bytes of a tensor's name; the specification says 64
_MOST_AXES = 4
_MOST_SIZE = 1 << 40  # a dimension

# Types of values: the formats of struct, and the two that have a length.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# Types of tensors: id -> name, weights of a block, bytes of a block.
TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """A tensor of a file: its ggml type, its shape with the outputs first, and the offsets of its bytes in the file."""

    path: Path
    type: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """A file's metadata by key, and its tensors by name in the order of the file."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """`general.architecture`; CheckpointError if it is missing."""
        name = self.get("general.architecture", str)
        assert isinstance(name, str)
        return name

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """The value of a key, of that Python type (float also takes int); CheckpointError: it has another type, or is
        missing and there is no default."""
        if key not in self.metadata:
            if default is ...:
                raise CheckpointError(f"{self.path} lacks {key} in its metadata: convert the model again")
            return default
        value = self.metadata[key]
        if kind is float and type(value) is int:
            value = float(value)
        if kind is float and type(value) is float:
            value = _shortest(value)
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise CheckpointError(
                f"{self.path}: {key} must be of type {kind.__name__}, got {brief(value)}: convert the model again"
            )
        return value


def _shortest(value: float) -> float:
    """The decimal number of the fewest digits that float32 stores as this value: 1e-5, not 9.999999747378752e-06."""
    for digits in range(1, 9) if abs(value) < 3e38 else ():
        short = float(f"{value:.{digits}g}")
        if abs(short) < 3.4e38 and struct.unpack("f", struct.pack("f", short))[0] == value:
            return short
    return value


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF, by its first bytes."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> GgufHeader:
    """The validated header of a file; CheckpointError names the file and the fault."""
    check_weight_file(path)
    stat = path.stat()
    return _read(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@functools.lru_cache(maxsize=4)  # a load reads it for the config, the weights and the tokenizer
def _read(path: Path, size: int, *_: int) -> GgufHeader:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _HeaderReader(path, data, size).header()
        except struct.error:
            raise _truncated(path) from None
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{path} has a broken header: a text in it is not UTF-8 ({error.reason})"
            ) from error


def _truncated(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or has a broken header: it ends inside it; fetch it again")


class _HeaderReader:
    def __init__(self, path: Path, data: mmap.mmap, size: int):
        self.path, self.data, self.size, self.at = path, data, size, 4

    def header(self) -> GgufHeader:
        if self.data[:4] != MAGIC:
            raise CheckpointError(f"{self.path} is no GGUF file: it does not begin with {MAGIC.decode()!r}")
        version = self.number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            why = "it is big-endian" if swapped in VERSIONS else f"it has version {version}"
            raise CheckpointError(
                f"{self.path}: {why}, which is not supported; known are the little-endian versions 2 and 3"
            )
        tensors, entries = self.number("Q"), self.number("Q")
        if max(tensors, entries) > _MOST:
            self.broken(f"it counts {tensors} tensors and {entries} metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self.text(_MOST_KEY)
            if key in metadata:
                self.broken(f"the key {brief(key)} occurs twice")
            metadata[key] = self.value(self.number("I"), key)
        listed = [self.tensor() for _ in range(tensors)]
        return GgufHeader(path=self.path, metadata=metadata, tensors=self.placed(listed, metadata))

    def broken(self, fault: str) -> None:
        raise CheckpointError(f"{self.path} has a broken header: {fault}")

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return value

    def text(self, most: int | None = None) -> str:
        length = self.number("Q")
        if length > self.size - self.at or (most is not None and length > most):
            self.broken(f"a text of {length} bytes, {self.size - self.at} before the end of the file")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            self.broken(f"{brief(key)} has the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        form = _SCALARS.get(kind)
        if form is None and kind != _STRING:
            self.broken(f"{brief(key)} is an array of the unsupported type {kind}")
        least = 8 if form is None else struct.calcsize("<" + form)
        if count > (self.size - self.at) // least:
            self.broken(f"{brief(key)} has {count} elements, more than the file has bytes for")
        if form is None:
            return [self.text() for _ in range(count)]
        values = struct.unpack_from(f"<{count}{form}", self.data, self.at)
        self.at += count * least
        return list(values)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of a tensor."""
        name, axes = self.text(_MOST_NAME), self.number("I")
        if not 1 <= axes <= _MOST_AXES:
            self.broken(f"tensor {brief(name)} has {axes} dimensions")
        dims = [self.number("Q") for _ in range(axes)]
        kind, offset = self.number("I"), self.number("Q")
        if not all(1 <= dim <= _MOST_SIZE for dim in dims):
            self.broken(f"tensor {brief(name)} has the dimensions {dims}")
        return name, tuple(reversed(dims)), kind, offset

    def placed(
        self, listed: list[tuple[str, tuple[int, ...], int, int]], metadata: Mapping[str, Any]
    ) -> dict[str, GgufTensor]:
        """The tensors with the offsets of their bytes in the file."""
        alignment: Any = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= _MOST or alignment & (alignment - 1):
            self.broken(f"general.alignment is {brief(alignment)}, not a power of two")
        start = -(-self.at // alignment) * alignment
        found: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in listed:
            if name in found:
                self.broken(f"tensor {brief(name)} occurs twice")
            if kind not in TYPES:
                raise CheckpointError(
                    f"{self.path}: tensor {brief(name)} has the unknown type {kind}; known are "
                    f"{', '.join(known for known, *_ in TYPES.values())}"
                )
            type_name, block, width = TYPES[kind]
            if shape[-1] % block:
                self.broken(f"tensor {brief(name)} of {type_name} has rows of {shape[-1]} weights")
            length, begin = prod(shape) // block * width, start + offset
            if offset % alignment:
                self.broken(f"tensor {brief(name)} begins at {offset}, which is not aligned")
            if begin + length > self.size:
                raise CheckpointError(
                    f"{self.path} is truncated: tensor {brief(name)} ends at byte {begin + length} of {self.size}; "
                    "fetch it again"
                )
            found[name] = GgufTensor(
                path=self.path, type=type_name, shape=shape, begin=begin, end=begin + length
            )
        end, last = 0, ""
        for name, tensor in sorted(found.items(), key=lambda item: item[1].begin):
            if tensor.begin < end:
                self.broken(f"tensor {brief(name)} overlaps {brief(last)}")
            end, last = tensor.end, name
        return found
