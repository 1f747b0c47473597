"""Output and exit codes of all commands: results on stdout, notes and errors on stderr."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, TextIO, get_type_hints

import typer

from monoblock import extra_of

FAILURE, INTERRUPTED, BROKEN_PIPE = 1, 130, 141  # the last two are 128 + SIGINT and 128 + SIGPIPE

DEBUG = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

# Errors caused by a model, a file, the network or a missing package; any other error is a bug.
EXPECTED = (OSError, ValueError, ImportError, MemoryError, RuntimeError)

# Control characters in generated text, except tab and newline, would be interpreted by a terminal.
_CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
}


def styled(text: str, code: str, stream: TextIO) -> str:
    """The text in an ANSI style ("2" dim, "31" red) if the stream is a terminal and NO_COLOR is not set."""
    if stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb":
        return f"\x1b[{code}m{text}\x1b[0m"
    return text


def note(text: str) -> None:
    """Print a note on stderr."""
    print(styled(text, "2", sys.stderr), file=sys.stderr, flush=True)


def print_error(error: BaseException) -> None:
    """Print a one-line error message on stderr."""
    print(styled("monoblock:", "31", sys.stderr), message_of(error), file=sys.stderr, flush=True)


def message_of(error: BaseException) -> str:
    """A one-line message for an error; unexpected errors ask for a bug report."""
    if isinstance(error, ModuleNotFoundError) and (extra := extra_of(error.name)) is not None:
        return f'{error.name} is not installed: pip install "monoblock[{extra}]"'
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, EXPECTED):
        return text
    kind = type(error).__name__
    return f"unexpected {kind}: {text}; run again with --debug for the traceback, and please report it"


def write(text: str) -> None:
    """Write result text to stdout and flush; at a terminal, control characters are replaced."""
    sys.stdout.write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def rows(title: str, pairs: Iterable[tuple[str, str]]) -> None:
    """Print names and values: a table at a terminal, else `name: value` lines."""
    if not sys.stdout.isatty():
        print(f"# {title}")
        for name, value in pairs:
            print(f"{name}: {value}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False
    )
    for name, value in pairs:
        table.add_row(Text(name, style="cyan"), Text(value))
    Console(highlight=False).print(table)


@contextmanager
def exit_codes(debug: bool) -> Iterator[None]:
    """Convert exceptions in the block to a message and an exit code; with `debug`, re-raise them."""
    try:
        yield
        sys.stdout.flush()
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except BrokenPipeError:
        # The interpreter flushes stdout again at exit, so redirect it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN_PIPE) from None
    except KeyboardInterrupt:
        if debug:
            raise
        raise typer.Exit(INTERRUPTED) from None
    except BaseException as error:
        # A panic in the tokenizers' Rust code is a BaseException, as are SystemExit and the like, which are re-raised.
        panic = type(error).__name__ == "PanicException"
        if debug or not (isinstance(error, Exception) or panic):
            raise
        print_error(error)
        raise typer.Exit(FAILURE) from None


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator for typer commands: errors become exit codes, each field of a dataclass argument becomes an option, and
    an option --debug is added."""
    signature = inspect.signature(function)
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    flat: list[inspect.Parameter] = []
    for name in signature.parameters:
        if name in groups:
            types = get_type_hints(groups[name], include_extras=True)
            flat += [
                inspect.Parameter(
                    f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=types[f.name]
                )
                for f in fields(groups[name])
            ]
        else:
            flat.append(
                signature.parameters[name].replace(
                    kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]
                )
            )

    flat.append(inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=DEBUG))

    @functools.wraps(function)
    def run(*, debug: bool, **values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{f.name: values.pop(f.name) for f in fields(group)})
        warnings.showwarning = _show_warning
        with exit_codes(debug):
            function(**values)

    # Typer reads these.
    run.__signature__ = signature.replace(parameters=flat, return_annotation=None)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in flat}
    return run


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    note(f"warning: {' '.join(str(message).split())}")
