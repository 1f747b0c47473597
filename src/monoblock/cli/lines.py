"""What a user types: lines, lines that go on after a backslash, and blocks between triple quotes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

PROMPT, MORE = "> ", ". "
QUOTES = '"""'


@dataclass(frozen=True)
class Entry:
    """One input of the user; the text of a `block` is never a command."""

    text: str
    block: bool = False


def entries(interactive: bool) -> Iterator[Entry]:
    """The user's inputs until the end; at a terminal with editing and recall.

    Ctrl-C in the middle of an input drops it; before one, KeyboardInterrupt comes out. ValueError if the end comes
    inside a block that is not typed at a terminal.
    """
    read = _typed if interactive else _piped
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  # its import gives input() editing and recall
    while (line := read(PROMPT)) is not None:
        try:
            entry = _whole(line, read)
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            continue
        if entry is None:
            if interactive:
                return
            raise ValueError(f"the input ends inside a block: expected {QUOTES} at its end")
        yield entry


def _whole(line: str, read: Callable[[str], str | None]) -> Entry | None:
    """The input that begins with this line; None if it never ends."""
    if line.lstrip().startswith(QUOTES):
        text = line.lstrip().removeprefix(QUOTES)
        while not text.rstrip().endswith(QUOTES):
            if (more := read(MORE)) is None:
                return None
            text += "\n" + more
        return Entry(text.rstrip().removesuffix(QUOTES).strip("\n"), block=True)
    while line.endswith("\\"):
        line = line.removesuffix("\\") + "\n"
        line += read(MORE) or ""
    return Entry(line)


def _piped(prompt: str) -> str | None:
    del prompt  # nobody sees it
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def _typed(prompt: str) -> str | None:
    try:
        if sys.stdout.isatty():
            return input(prompt)
        sys.stderr.write(prompt)  # the prompt is no part of the result
        sys.stderr.flush()
        return input()
    except EOFError:
        sys.stderr.write("\n")
        return None
