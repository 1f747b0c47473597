"""Interactive input: lines, lines continued after a backslash, and blocks between triple quotes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

PROMPT, MORE = "> ", ". "
QUOTES = '"""'


@dataclass(frozen=True)
class TypedMessage:
    """One input; the text of a `block` is never a command."""

    text: str
    block: bool = False


def entries(interactive: bool) -> Iterator[TypedMessage]:
    """The user's inputs until the end; at a terminal, with line editing and history.

    Ctrl-C within an input discards it; otherwise KeyboardInterrupt is raised. ValueError if piped input ends within a
    block.
    """
    read = _typed if interactive else _piped
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  # enables editing and history in input()
    while (line := read(PROMPT)) is not None:
        try:
            entry = _complete(line, read)
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            continue
        if entry is None:
            if interactive:
                return
            raise ValueError(f"the input ends inside a block: expected {QUOTES} at its end")
        yield entry


def _complete(line: str, read: Callable[[str], str | None]) -> TypedMessage | None:
    """The input that begins with this line; None if it is not complete at the end."""
    if line.lstrip().startswith(QUOTES):
        text = line.lstrip().removeprefix(QUOTES)
        while not text.rstrip().endswith(QUOTES):
            if (more := read(MORE)) is None:
                return None
            text += "\n" + more
        return TypedMessage(text.rstrip().removesuffix(QUOTES).strip("\n"), block=True)
    while line.endswith("\\"):
        line = line.removesuffix("\\") + "\n"
        line += read(MORE) or ""
    return TypedMessage(line)


def _piped(prompt: str) -> str | None:
    del prompt  # not shown
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def _typed(prompt: str) -> str | None:
    try:
        if sys.stdout.isatty():
            return input(prompt)
        sys.stderr.write(prompt)  # the prompt must not go to stdout
        sys.stderr.flush()
        return input()
    except EOFError:
        sys.stderr.write("\n")
        return None
