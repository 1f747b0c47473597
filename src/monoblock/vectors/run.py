"""A resumable run: texts of an input to an index, chunk by chunk, with bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from monoblock.vectors.inputs import STDIN, TextInput, chained, chunks
from monoblock.vectors.outputs import output_format
from monoblock.vectors.partial import Partial, RunJournal

MODEL = "--model"  # the option whose value is a fingerprint

# Texts -> their vectors, [texts, width], and how many of the texts were truncated.
Encode = Callable[[list[str]], tuple[np.ndarray, int]]
# Chunks of texts -> each with what `Encode` gives, in the same order.
EncodeChunks = Callable[[Iterator[list[str]]], Iterator[tuple[list[str], tuple[np.ndarray, int]]]]


class EmbeddingRun:
    """A run that is new or resumed; `total` is the number of texts if the input tells."""

    def __init__(self, source: TextInput, partial: Partial, journal: RunJournal, total: int | None) -> None:
        self._source, self._partial, self._journal = source, partial, journal
        self.resumed, self.total = journal.count, total

    @property
    def whole(self) -> bool:
        """Whether all texts are written, and at most renames are left."""
        return self._journal.whole

    @property
    def count(self) -> int:
        """The number of texts that are written."""
        return self._journal.count

    @property
    def truncated(self) -> int:
        """The number of texts that were truncated."""
        return self._journal.truncated

    @property
    def width(self) -> int:
        """The number of values of a vector; 0 before the first."""
        return self._journal.width

    @property
    def threads(self) -> int | None:
        """The number of threads that the model had; None: not known."""
        return self._journal.threads

    def publish(self) -> None:
        """Complete the renames of a run that is `whole`."""
        self._partial.publish()

    def execute(
        self,
        encode: Encode,
        chunk: int,
        description: Mapping[str, Any],
        progress: Callable[[int], None],
        threads: int | None = None,
    ) -> None:
        """Encode the remaining texts in chunks of `chunk`, one after another, and finish. `progress` gets the count so
        far; `threads` is that of the model, for the journal.

        ValueError: the input has no text, or other texts than the ones of a resumed run; a vector is not finite.
        """
        self.execute_chunks(
            lambda found: ((texts, encode(texts)) for texts in found), chunk, description, progress, threads
        )

    def execute_chunks(
        self,
        encode: EncodeChunks,
        chunk: int,
        description: Mapping[str, Any],
        progress: Callable[[int], None],
        threads: int | None = None,
    ) -> None:
        """As `execute`, with a function that may encode several chunks at a time."""
        journal = self._journal
        journal.description, journal.threads = dict(description), threads
        stream = chunks(self._source.texts(), chunk)
        self._skip(stream)
        progress(journal.count)
        for texts, (vectors, truncated) in encode(stream):
            _check(vectors, len(texts), journal)
            journal.width = vectors.shape[1]
            journal.count += len(texts)
            journal.truncated += truncated
            journal.digest = chained(journal.digest, texts)
            self._partial.append(journal, texts, vectors)
            progress(journal.count)
        if not journal.count:
            raise ValueError(f"{self._source.name} holds no text")
        self._partial.finish(journal)

    def _skip(self, stream: Iterator[list[str]]) -> None:
        """Read over the texts that are written; ValueError if they are not the same."""
        count, digest = 0, ""
        while count < self._journal.count and (texts := next(stream, None)) is not None:
            count += len(texts)
            digest = chained(digest, texts)
        if (count, digest) != (self._journal.count, self._journal.digest):
            raise ValueError(_other_input(self._partial, self._journal, self._source))


@contextmanager
def started(
    source: TextInput, output: Path, options: Mapping[str, Any], *, restart: bool = False, force: bool = False
) -> Generator[EmbeddingRun, None, None]:
    """A run of `source` into `output`, resumed if there is an unfinished one with the same input and options.

    Args:
        options: everything else that the vectors depend on, by the names that messages use; values of JSON.
        restart: discard an unfinished run.
        force: replace `output` when the run is finished.

    ValueError: the unfinished run has another input or other options. FileExistsError: `output` exists.
    """
    output_format(output)
    if source.path != STDIN and not Path(source.path).exists():
        raise FileNotFoundError(f"{source.path}: no such file")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output.parent} is no folder: create it, or choose another output")
    with Partial.opened(output) as partial:
        journal = None if restart else partial.journal()
        if output.exists() and not force and not (journal and journal.whole):
            raise FileExistsError(f"{output} exists: choose another name, or replace it with --force")
        found = source.fingerprint()
        identity = None if found is None else {"size": found.size, "digest": found.digest}
        total = None if found is None else found.total
        if journal is None:
            partial.begin()
            journal = RunJournal(source=identity, options=dict(options))
        else:
            _check_same(partial, journal, source, identity, options)
            if not journal.whole:
                partial.cut(journal)
        try:
            yield EmbeddingRun(source, partial, journal, total)
        except BaseException:
            if not journal.count:
                partial.clear()
            raise


def _check_same(
    partial: Partial,
    journal: RunJournal,
    source: TextInput,
    identity: dict[str, Any] | None,
    options: Mapping[str, Any],
) -> None:
    for name in {**journal.options, **options}:
        old, new = journal.options.get(name), options.get(name)
        if old != new:
            values = f"{name} {_shown(old)}, and now it is {_shown(new)}"
            if name == MODEL:
                values = f"another {name}, or another version of it"
            raise ValueError(
                f"{_unfinished(partial, journal)} with {values}: give the same, or begin again with --restart"
            )
    if journal.source != identity:
        raise ValueError(_other_input(partial, journal, source))


def _unfinished(partial: Partial, journal: RunJournal) -> str:
    return f"{partial.vectors} holds {journal.count:,} texts of a run that was begun"


def _other_input(partial: Partial, journal: RunJournal, source: TextInput) -> str:
    return (
        f"{_unfinished(partial, journal)} with another input: {source.name} has other texts; give the same input, or "
        "begin again with --restart"
    )


def _shown(value: Any) -> str:
    return "not given" if value is None else repr(value)


def _check(vectors: np.ndarray, count: int, journal: RunJournal) -> None:
    width = journal.width or vectors.shape[-1]
    if vectors.shape != (count, width):
        raise ValueError(f"the model returned {vectors.shape} for {count} texts; expected ({count}, {width})")
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        at = journal.count + int(np.argmin(finite)) + 1
        raise ValueError(f"the vector of text {at} is not finite: load the model with --dtype float32")
