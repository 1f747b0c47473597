"""Parquet files through pyarrow, which is imported at the first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from monoblock.installed import installed

METADATA = b"monoblock"  # the key of an index's description in the schema's metadata

_ROWS = 4096  # rows that are read together, and rows of a group that is written


def need() -> None:
    """ImportError with the pip command if pyarrow is not installed."""
    if not installed("pyarrow"):
        raise ImportError(
            'Parquet files need pyarrow, which is not installed: pip install "monoblock[parquet]"'
        )


def count(path: str | Path) -> int:
    """The number of rows."""
    with _opened(path) as file:
        return int(file.metadata.num_rows)


def width(path: str | Path) -> int | None:
    """The number of values of each list in the column "embedding"; None if its type does not fix it."""
    with _opened(path) as file:
        kind = _column(path, file, "embedding").type
    return int(kind.list_size) if hasattr(kind, "list_size") else None


def description(path: str | Path) -> bytes | None:
    """The description in the file's metadata, or None."""
    with _opened(path) as file:
        return (file.schema_arrow.metadata or {}).get(METADATA)


def texts(path: str | Path, column: str) -> Iterator[object]:
    """The values of a column, read in batches; ValueError if there is no such column."""
    with _opened(path) as file:
        _column(path, file, column)
        for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
            yield from batch.column(0).to_pylist()


def rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows by the names of their columns, read in batches; lists and structs are lists and dicts. ValueError if two
    columns have one name."""
    with _opened(path) as file:
        names = file.schema_arrow.names
        if len(set(names)) != len(names):
            raise ValueError(f"{path}: a column is there twice: {', '.join(map(repr, names))}")
        for batch in file.iter_batches(batch_size=_ROWS):
            yield from batch.to_pylist()


def vectors(path: str | Path) -> Iterator[np.ndarray]:
    """Blocks of rows of the column "embedding", [rows, width] float32; ValueError for rows of unequal length."""
    with _opened(path) as file:
        _column(path, file, "embedding")
        for batch in file.iter_batches(batch_size=_ROWS, columns=["embedding"]):
            column = batch.column(0)
            values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
            rows = len(column)
            if (
                column.null_count
                or values.size % max(rows, 1)
                or not _even(column, values.size // max(rows, 1))
            ):
                raise ValueError(
                    f"{path}: the lists in the column 'embedding' differ in length, or are missing"
                )
            yield values.reshape(rows, -1)


def _even(column: Any, size: int) -> bool:
    if hasattr(column.type, "list_size"):
        return True
    return bool((column.value_lengths().to_numpy(zero_copy_only=False) == size).all())


def write(
    path: Path, described: bytes, width: int, rows: Callable[[int], Iterator[tuple[list[str], np.ndarray]]]
) -> None:
    """Write the columns "text" (string) and "embedding" (list of `width` float32). `rows(n)` iterates over both, n rows
    together."""
    arrow, parquet = _arrow(), _parquet()
    schema = arrow.schema(
        [
            arrow.field("text", arrow.string(), nullable=False),
            arrow.field("embedding", arrow.list_(arrow.float32(), width), nullable=False),
        ],
        metadata={METADATA: described},
    )
    with parquet.ParquetWriter(
        path, schema, compression="zstd", use_dictionary=False, write_statistics=False
    ) as writer:
        for some, array in rows(_ROWS):
            values = arrow.array(array.reshape(-1), arrow.float32())
            columns = [arrow.array(some, arrow.string()), arrow.FixedSizeListArray.from_arrays(values, width)]
            writer.write_table(arrow.Table.from_arrays(columns, schema=schema), row_group_size=_ROWS)


def _arrow() -> Any:
    need()
    return importlib.import_module("pyarrow")


def _parquet() -> Any:
    need()
    return importlib.import_module("pyarrow.parquet")


def _column(path: str | Path, file: Any, name: str) -> Any:
    known = file.schema_arrow.names
    if known.count(name) != 1:
        raise ValueError(f"{path}: expected one column {name!r}; the file has {', '.join(map(repr, known))}")
    return file.schema_arrow.field(name)


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    module, arrow = _parquet(), _arrow()
    try:
        with Path(path).open("rb") as raw, module.ParquetFile(raw) as file:
            yield file
    except UnicodeDecodeError:
        raise ValueError(f"{path}: a text is not UTF-8") from None
    except (arrow.ArrowInvalid, arrow.ArrowNotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system, not of damaged content
            raise
        raise ValueError(f"{path} is no valid Parquet file: {' '.join(str(error).split())}") from None
