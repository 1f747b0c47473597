"""The formats of an index: vectors with their texts and a description of how they were made.

| suffix | files |
|---|---|
| .npy | the vectors, [texts, width] float32; beside it NAME.npy.texts.jsonl, NAME.npy.index.json (the description) |
| .jsonl | a line {"text", "embedding"} per text; beside it NAME.jsonl.index.json |
| .parquet | columns text and embedding (list of fixed size, float32); the description is in the schema's metadata |
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from monoblock.vectors import parquet

FORMATS = (".npy", ".parquet", ".jsonl")
HEADER = 128  # bytes of the header of a .npy file of two axes, as NumPy writes it

_ROWS = 1024  # rows that are written together


def output_format(path: Path) -> str:
    """The suffix of an index; ValueError for another one, ImportError for .parquet without pyarrow."""
    found = path.suffix.lower()
    if found not in FORMATS:
        raise ValueError(f"{path}: the suffix of an index is one of {', '.join(FORMATS)}")
    if found == ".parquet":
        parquet.need()
    return found


def beside(path: Path, what: str) -> Path:
    """The file of that kind next to an index: "texts.jsonl", "index.json", "partial", ..."""
    return path.with_name(f"{path.name}.{what}")


def npy_header(count: int, width: int) -> bytes:
    """The header that `numpy.save` writes for a float32 array [count, width] (NEP 1, version 1.0)."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({count}, {width}), }}"
    room = HEADER - 10
    return b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + text.ljust(room - 1).encode("latin1") + b"\n"


def text_line(text: str) -> bytes:
    """The line of a text in NAME.npy.texts.jsonl."""
    return json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"


def described(description: dict[str, Any]) -> bytes:
    """The description as a JSON file."""
    return json.dumps(description, indent=1, ensure_ascii=False).encode() + b"\n"


def rows(
    vectors: Path, texts: Path, width: int, count: int, size: int = _ROWS
) -> Iterator[tuple[list[str], np.ndarray]]:
    """`count` texts and their vectors, [size, width] float32, from the files of a run; `size` together."""
    with vectors.open("rb") as data, texts.open("rb") as lines:
        data.seek(HEADER)
        for start in range(0, count, size):
            some = [json.loads(line)["text"] for line in islice(lines, min(size, count - start))]
            raw = data.read(len(some) * width * 4)
            yield some, np.frombuffer(raw, "<f4").reshape(len(some), width)


def assemble(kind: str, target: Path, vectors: Path, texts: Path, description: dict[str, Any]) -> None:
    """Write the .jsonl or .parquet file of a finished run. A float32 is written as the shortest decimal of its value in
    double precision, which reads back exactly."""
    width, count = description["width"], description["count"]
    if kind == ".parquet":
        raw = json.dumps(description).encode()
        parquet.write(target, raw, width, lambda size: rows(vectors, texts, width, count, size))
        return
    with target.open("wb") as file:
        for some, array in rows(vectors, texts, width, count):
            for text, vector in zip(some, array.tolist(), strict=True):
                line = {"text": text, "embedding": vector}
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
