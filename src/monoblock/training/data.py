"""Records of data files and datasets: JSON objects, rows, or texts; checked before a model is loaded."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from monoblock.field_types import brief
from monoblock.texts import check_characters, read_text
from monoblock.training.hub_datasets import DatasetSource, dataset_source, digest_of_rows, read_dataset
from monoblock.vectors import parquet

JSONL = (".jsonl", ".ndjson")
CSV = (".csv", ".tsv")
PARQUET = ".parquet"
TEXTS = (".txt", ".md", ".text", ".rst", ".py", "")  # of a folder; a single file may have any other suffix

_MAX_FIELD = 1 << 27  # characters of a CSV field


@dataclass(frozen=True)
class Record:
    """One object of a data file; `where`: its file and line, for messages."""

    where: str
    values: dict[str, Any]

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def get(self, name: str) -> Any:
        """A field's value; ValueError if there is none."""
        if not self.has(name):
            known = ", ".join(map(repr, self.values)) or "no field"
            raise ValueError(f"{self.where}: there is no field {name!r}; the record has {known}")
        return self.values[name]

    def text(self, name: str) -> str:
        """A field with a text that is not empty."""
        value = self.get(name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{self.where}: {name!r} must be a text, got {brief(value)}")
        check_characters(value, f"{self.where}: {name!r}")
        return value

    def error(self, problem: str) -> ValueError:
        """An error that names the record."""
        return ValueError(f"{self.where}: {problem}")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How data is read. `columns`: the column that holds a field, where names differ. `train`: whether a dataset's
    split is `train` if none is named. `streaming`: read a dataset without files in the cache. `offline`: from the cache
    only."""

    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    train: bool = True
    streaming: bool = False
    offline: bool = False


class Records(list[Record]):
    """The records of a file or a dataset; `classes`: names of the classes of a dataset's columns, in order."""

    classes: Mapping[str, Sequence[str]] = {}


Filled = TypeVar("Filled", bound=list[Record])


def read_records(path: str, how: Reading | None = None) -> Records:
    """The records of a .jsonl, .ndjson, .json, .csv, .tsv or .parquet file, or of a dataset. ValueError names the line
    or the row of a wrong one. ImportError: Parquet or datasets are not installed."""
    how = how or Reading()
    if (source := dataset_source(path)) is not None:
        return _renamed(_dataset(source, how), how.columns, path)
    _refuse_streaming(path, how)
    file = _existing(path)
    suffix = file.suffix.lower()
    if file.is_dir():
        raise ValueError(
            f"{path} is a folder without files of records: this task reads a file (.jsonl, .json, .csv, .tsv or "
            ".parquet) or a dataset"
        )
    if suffix in JSONL:
        found = Records(_jsonl(file))
    elif suffix in CSV:
        found = Records(_csv(file))
    elif suffix == ".json":
        found = Records(_json(file))
    elif suffix == PARQUET:
        found = Records(Record(f"{file}, row {i}", row) for i, row in enumerate(parquet.rows(file), 1))
    else:
        raise ValueError(
            f"{path}: this task reads .jsonl, .json, .csv, .tsv or .parquet files, not {suffix or 'this one'}"
        )
    return _renamed(_filled(found, path), how.columns, path)


def read_documents(path: str, column: str | None, how: Reading | None = None) -> list[Record]:
    """Documents in the field `text`: a text file, the text files of a folder, or a column of a JSONL, CSV or Parquet
    file or of a dataset."""
    how = how or Reading()
    name = column or "text"
    if (source := dataset_source(path, documents=True)) is not None:
        records = _renamed(_dataset(source, how), how.columns, path)
        return [Record(record.where, {"text": record.text(name)}) for record in records]
    _refuse_streaming(path, how)
    file = _existing(path)
    if file.is_dir():
        files = [p for p in sorted(file.rglob("*")) if p.is_file() and p.suffix.lower() in TEXTS]
        if not files:
            raise ValueError(f"{path}: the folder has no text files ({', '.join(filter(None, TEXTS))})")
        found = [Record(str(p), {"text": read_text(p)}) for p in files]
    elif file.suffix.lower() in (*JSONL, *CSV, ".json"):
        return [Record(record.where, {"text": record.text(name)}) for record in read_records(path, how)]
    elif file.suffix.lower() == PARQUET:
        stored = how.columns.get(name, name)
        rows = enumerate(parquet.texts(file, stored), 1)  # without the other columns
        records = [Record(f"{file}, row {i}", {name: value}) for i, value in rows]
        return [Record(record.where, {"text": record.text(name)}) for record in _filled(records, path)]
    else:
        found = [Record(path, {"text": read_text(file)})]
    for option, given in (("text_column", column), ("columns", how.columns)):
        if given:
            raise ValueError(
                f"{option}={brief(given)} is for JSONL, CSV and Parquet files and datasets; {path} is plain text: drop "
                "it"
            )
    return _filled([record for record in found if record.values["text"].strip()], path)


def _dataset(source: DatasetSource, how: Reading) -> Records:
    """The rows of a dataset."""
    read = read_dataset(source, train=how.train, streaming=how.streaming, offline=how.offline)
    found = Records(Record(f"{source.given}, row {i}", row) for i, row in enumerate(read.rows, 1))
    found.classes = read.classes
    return _filled(found, source.given)


def _refuse_streaming(path: str, how: Reading) -> None:
    if how.streaming:
        raise ValueError(f"streaming is for datasets; {path} is none: drop it")


def _renamed(records: Records, columns: Mapping[str, str], path: str) -> Records:
    """Records with the fields of `columns`, which replace fields of these names. ValueError: no record has one."""
    if not columns:
        return records
    found = Records()
    for record in records:
        fields = {name: record.values[column] for name, column in columns.items() if column in record.values}
        kept = {name: value for name, value in record.values.items() if name not in columns.values()}
        found.append(Record(record.where, kept | fields))
    there = {name for record in records for name in record.values}
    for name, column in columns.items():
        if column not in there:
            known = ", ".join(map(repr, sorted(there)))
            raise ValueError(f"columns={name}={column}: {path} has no column {column!r}; it has {known}")
    back = {column: name for name, column in columns.items()}
    found.classes = {back.get(name, name): names for name, names in records.classes.items()}
    return found


def digest(path: str, records: Iterable[Record], *, documents: bool = False) -> str:
    """A digest of a file, or of the files of a folder; of a dataset, that of its records."""
    found, top = hashlib.blake2b(digest_size=16), Path(path)
    if dataset_source(path, documents=documents) is not None:
        for part in digest_of_rows(record.values for record in records):
            found.update(part)
        return found.hexdigest()
    for file in sorted(p for p in top.rglob("*") if p.is_file()) if top.is_dir() else [top]:
        found.update(os.fsencode(file.relative_to(top) if file != top else "") + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                found.update(block)
    return found.hexdigest()


def _existing(path: str) -> Path:
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(
            f"{path}: there is no such file or folder; a dataset of the hub is OWNER/NAME or NAME:SPLIT"
        )
    return file


def _filled(records: Filled, path: str) -> Filled:
    if not records:
        raise ValueError(f"{path} is empty: training needs at least one record")
    return records


def _object(value: object, where: str) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return Record(where, cast("dict[str, Any]", value))


def _jsonl(file: Path) -> Iterator[Record]:
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            where = f"{file}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8"
                ) from None
            if line.strip():
                yield _object(_parsed(line, where), where)


def _json(file: Path) -> list[Record]:
    content = _parsed(read_text(file), str(file))
    if isinstance(content, dict):
        return [_object(content, str(file))]
    if not isinstance(content, list):
        raise ValueError(f"{file}: expected a JSON list of objects, found {type(content).__name__}")
    return [
        _object(value, f"{file}, element {i}") for i, value in enumerate(cast("list[object]", content), 1)
    ]


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({error})") from None


def _csv(file: Path) -> Iterator[Record]:
    csv.field_size_limit(_MAX_FIELD)
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    with file.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(rows, [])
            if len(set(header)) != len(header):
                raise ValueError(f"{file}: the header has a column twice: {', '.join(header)}")
            for row in rows:
                if row:
                    where = f"{file}, line {rows.line_num}"
                    if len(row) != len(header):
                        raise ValueError(f"{where}: expected {len(header)} fields, found {len(row)}")
                    yield Record(where, dict(zip(header, row, strict=True)))
        except csv.Error as error:
            raise ValueError(f"{file}, line {rows.line_num}: no CSV ({error})") from None
        except UnicodeDecodeError:
            raise ValueError(
                f"{file}, after line {rows.line_num}: not UTF-8; save the file as UTF-8"
            ) from None
