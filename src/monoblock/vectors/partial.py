"""The unfinished output of a run: the vectors and texts so far, and a journal of what they are.

A chunk of texts is appended in this order: vectors and texts, flushed to disk; then the journal, replaced by a rename.
The journal counts the bytes that are valid, so what a killed process wrote after them is cut off. When the last text is
written, the final files are prepared, the journal says `whole`, and renames put them under their names, that of the
index last. A killed sequence of renames is completed by the next run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from monoblock.checkpoint.files import read_json
from monoblock.checkpoint.journal import sync
from monoblock.checkpoint.locks import exclusive
from monoblock.vectors.outputs import (
    HEADER,
    assemble,
    beside,
    described,
    npy_header,
    output_format,
    text_line,
)

_VERSION = 1


@dataclass(kw_only=True)
class RunJournal:
    """What the partial files hold: `count` texts of `width` values, read from `source` (a fingerprint; None: a stream)
    with these options; `digest` is that of the texts, `threads` the number of threads of the model."""

    source: dict[str, Any] | None
    options: dict[str, Any]
    version: int = _VERSION
    count: int = 0
    width: int = 0
    text_bytes: int = 0
    digest: str = ""
    truncated: int = 0
    threads: int | None = None
    description: dict[str, Any] = field(default_factory=dict[str, Any])
    whole: bool = False


class Partial:
    """The partial files beside an output. All methods need the lock (`opened`)."""

    def __init__(self, output: Path) -> None:
        self.output, self.format = output, output_format(output)
        self.vectors = beside(output, "partial")
        self._texts = beside(output, "partial.texts")
        self._journal = beside(output, "partial.json")
        self._ready = beside(output, "partial.new")
        self._index = beside(output, "partial.index")

    @classmethod
    @contextmanager
    def opened(cls, output: Path) -> Generator[Partial, None, None]:
        """The partial files, locked. BlockingIOError if another process writes this output."""
        partial = cls(output)
        with exclusive(beside(output, "partial.lock")):
            yield partial

    def journal(self) -> RunJournal | None:
        """The journal, or None. ValueError if it is damaged or does not fit the files."""
        if not self._journal.exists():
            return None
        found = _parsed(read_json(self._journal))
        if found is None:
            raise ValueError(f"{self._journal} is no journal of this version: --restart begins again")
        if not found.whole and found.count:
            sizes = (self._bytes(found), found.text_bytes)
            if any(
                not path.exists() or path.stat().st_size < size
                for path, size in zip((self.vectors, self._texts), sizes, strict=True)
            ):
                raise ValueError(
                    f"{self.vectors} or {self._texts} is shorter than its journal says: --restart begins again"
                )
        return found

    def begin(self) -> None:
        """Remove all partial files and create empty ones."""
        self.clear()
        self.vectors.write_bytes(bytes(HEADER))
        self._texts.write_bytes(b"")

    def cut(self, journal: RunJournal) -> None:
        """Cut off what a killed process wrote after the last entry of the journal."""
        os.truncate(self.vectors, self._bytes(journal))
        os.truncate(self._texts, journal.text_bytes)

    def append(self, journal: RunJournal, texts: Sequence[str], vectors: np.ndarray) -> None:
        """Append texts and their vectors, [texts, width]; `journal` has the values after them, but for `text_bytes`,
        which is set here."""
        raw = b"".join(map(text_line, texts))
        for path, data in ((self.vectors, vectors.astype("<f4", copy=False).tobytes()), (self._texts, raw)):
            with path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        journal.text_bytes += len(raw)
        self.save(journal)

    def save(self, journal: RunJournal) -> None:
        """Replace the journal."""
        new = beside(self._journal, "new")
        _write(new, json.dumps(asdict(journal)).encode())
        new.replace(self._journal)

    def finish(self, journal: RunJournal) -> None:
        """Prepare the final files and publish them."""
        counts = {"width": journal.width, "count": journal.count, "text_bytes": journal.text_bytes}
        description = {**journal.description, **counts}
        if self.format == ".npy":
            with self.vectors.open("r+b") as file:
                file.write(npy_header(journal.count, journal.width))
                file.flush()
                os.fsync(file.fileno())
        else:
            assemble(self.format, self._ready, self.vectors, self._texts, description)
            sync(self._ready)
        if self.format != ".parquet":
            _write(self._index, described(description))
        journal.whole = True
        self.save(journal)
        self.publish()

    def publish(self) -> None:
        """Give the final files their names and remove the rest. Idempotent."""
        main = self.vectors if self.format == ".npy" else self._ready
        moves = [(main, self.output)]
        if self.format != ".parquet":
            moves.insert(0, (self._index, beside(self.output, "index.json")))
        if self.format == ".npy":
            moves.insert(0, (self._texts, beside(self.output, "texts.jsonl")))
        if main.exists() and len(moves) > 1:
            self.output.unlink(missing_ok=True)  # no old vectors with new texts
        for source, target in moves:
            if source.exists():
                source.replace(target)
        sync(self.output.parent)
        for path in (*self._files(), self._journal):  # the journal last, as it says that the output is whole
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all partial files, the journal first."""
        for path in (self._journal, *self._files()):
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """All partial files but the journal."""
        return [beside(self._journal, "new"), self.vectors, self._texts, self._ready, self._index]

    def _bytes(self, journal: RunJournal) -> int:
        return HEADER + journal.count * journal.width * 4


def _parsed(content: dict[str, Any]) -> RunJournal | None:
    try:
        found = RunJournal(**content)
    except TypeError:
        return None
    numbers = (found.count, found.width, found.text_bytes, found.truncated)
    valid = found.version == _VERSION and all(isinstance(n, int) and n >= 0 for n in numbers)
    return found if valid else None


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
