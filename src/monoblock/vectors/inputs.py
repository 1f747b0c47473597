"""The texts of a file or stream, one after the other, and the identity of what is read."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from monoblock.texts import check_characters
from monoblock.vectors import parquet

STDIN = "-"
FORMATS = ("text", "jsonl", "csv", "parquet")
COLUMN = "text"  # the default column
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}

_CHUNK_CHARACTERS = 4 << 20
_MAX_FIELD = 1 << 27  # characters of a CSV field
_BLOCK = 1 << 20  # bytes


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What a file holds: its size in bytes, a digest of all of it, and the number of texts if the format tells."""

    size: int
    digest: str
    total: int | None


@dataclass(frozen=True)
class TextInput:
    """A file of texts, or standard input ("-").

    `format`: "text" (a line is a text), "jsonl" (one object per line), "csv" (with a header line; tabs separate the
    fields of a .tsv file), "parquet"; by default that of the file's suffix, else "text". `column`: the name of the
    field with the text, by default "text". ValueError for a format or a column that does not apply.
    """

    path: str
    format: str = ""
    column: str | None = None

    def __post_init__(self) -> None:
        found = self.format or SUFFIXES.get(Path(self.path).suffix.lower(), "text")
        if found not in FORMATS:
            raise ValueError(f"input format {found!r}: expected one of {', '.join(FORMATS)}")
        if found == "text" and self.column is not None:
            raise ValueError(
                f"{self.name} is read as plain text, a text per line, which has no column {self.column!r}: "
                "choose the input format jsonl, csv or parquet, or no column"
            )
        if found == "parquet" and (self.path == STDIN or Path(self.path).is_fifo()):
            raise ValueError(f"{self.name} is a stream, and Parquet cannot be read from one: pass a file")
        object.__setattr__(self, "format", found)
        object.__setattr__(self, "column", None if found == "text" else self.column or COLUMN)

    @property
    def name(self) -> str:
        """The input's name in messages."""
        return "standard input" if self.path == STDIN else self.path

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file, not a stream."""
        return self.path != STDIN and Path(self.path).is_file()

    def fingerprint(self) -> Fingerprint | None:
        """What the file holds; None for a stream. It reads the file once."""
        if not self.is_file:
            return None
        digest, size, lines, last = hashlib.blake2b(digest_size=16), 0, 0, b"\n"
        with Path(self.path).open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                size += len(block)
                lines += block.count(b"\n")
                last = block[-1:]
        total: int | None = lines + (last != b"\n")
        if self.format == "csv":
            total = None  # a field may hold line ends
        elif self.format == "parquet":
            total = parquet.count(self.path)
        return Fingerprint(size=size, digest=digest.hexdigest(), total=total)

    def texts(self) -> Iterator[str]:
        """The texts in order. ValueError names the line or the row of one that is missing, no string or not UTF-8."""
        if self.format == "parquet":
            yield from self._checked(parquet.texts(self.path, self.column or COLUMN), "row")
            return
        with self._opened() as file:
            if self.format == "text":
                yield from (text for _, text in self._lines(file))
            elif self.format == "jsonl":
                yield from self._objects(file)
            else:
                yield from self._fields(file)

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        if self.path == STDIN:
            yield sys.stdin.buffer
            return
        with Path(self.path).open("rb") as file:
            yield file

    def _checked(self, values: Iterable[object], unit: str) -> Iterator[str]:
        for number, value in enumerate(values, 1):
            yield self._text(value, f"{self.name}, {unit} {number}")

    def _text(self, value: object, where: str) -> str:
        if not isinstance(value, str):
            what = "nothing" if value is None else f"a value of type {type(value).__name__}"
            raise ValueError(f"{where}: expected a string in {self.column!r}, found {what}")
        check_characters(value, where)
        return value

    def _lines(self, file: BinaryIO) -> Iterator[tuple[str, str]]:
        """The lines without their ends (LF or CRLF), each with its name in messages."""
        for number, raw in enumerate(file, 1):
            where = f"{self.name}, line {number}"
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            try:
                yield where, raw.removesuffix(b"\n").removesuffix(b"\r").decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where}: byte {error.start} is not UTF-8; save the input as UTF-8"
                ) from None

    def _objects(self, file: BinaryIO) -> Iterator[str]:
        for where, line in self._lines(file):
            if not line.strip():
                continue
            try:
                row: object = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: no JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
            fields = cast("dict[str, object]", row)
            if self.column not in fields:
                known = ", ".join(map(repr, fields)) or "no field"
                raise ValueError(f"{where}: there is no field {self.column!r}; the object has {known}")
            yield self._text(fields[self.column], where)

    def _fields(self, file: BinaryIO) -> Iterator[str]:
        csv.field_size_limit(_MAX_FIELD)
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        delimiter = "\t" if self.path.lower().endswith(".tsv") else ","
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(rows, [])
            if header.count(self.column or COLUMN) != 1:
                raise ValueError(
                    f"{self.name}: expected one column {self.column!r}; the header has {', '.join(map(repr, header))}"
                )
            at = header.index(self.column or COLUMN)
            for row in rows:
                if row:
                    where = f"{self.name}, line {rows.line_num}"
                    if len(row) != len(header):
                        raise ValueError(f"{where}: expected {len(header)} fields, found {len(row)}")
                    yield self._text(row[at], where)
        except csv.Error as error:
            raise ValueError(f"{self.name}, line {rows.line_num}: no CSV ({error})") from None
        except UnicodeDecodeError:
            raise ValueError(
                f"{self.name}, after line {rows.line_num}: not UTF-8; save the input as UTF-8"
            ) from None
        finally:
            lines.detach()


def chunks(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of `size` texts, fewer if they are long. Where a list ends depends on the texts alone, so that a resumed
    run encodes the same lists."""
    chunk: list[str] = []
    characters = 0
    for text in texts:
        chunk.append(text)
        characters += len(text)
        if len(chunk) == size or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def chained(digest: str, texts: Iterable[str]) -> str:
    """The digest of all texts so far, from that of the texts before these."""
    found = hashlib.blake2b(digest.encode(), digest_size=16)
    for text in texts:
        raw = text.encode()
        found.update(len(raw).to_bytes(8, "little") + raw)
    return found.hexdigest()
