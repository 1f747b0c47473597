"""The top of the command line: the list of sub-commands, each imported only when it is needed."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
import typer.core
import typer.main

# Each is a module of this package with an `app`; the order is that of `monoblock --help`.
COMMANDS = ("generate", "chat", "attention", "info", "convert", "quantize", "bench", "env")

# Plain help instead of rich panels: it takes half the time, and looks the same in a pipe.
PLAIN: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False}

EXIT_CODES = (
    "Exit codes: 0 success; 1 the model, its files or the hub failed (one sentence on stderr); "
    "2 wrong usage; 130 interrupted by Ctrl-C; 141 the reader of the output went away."
)


class LazyGroup(typer.core.TyperGroup):
    """A group that knows its commands' names, and imports the module of a command that is asked for."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.commands = dict.fromkeys(COMMANDS)  # type: ignore[assignment]  # only the names are read

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, or None (then the group says so); the context does not matter."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"monoblock.cli.{cmd_name}")
        command = typer.main.get_command(module.app)
        command.name = cmd_name
        return command


def command() -> Any:
    """The whole command line, callable."""
    app = typer.Typer(
        cls=LazyGroup,
        no_args_is_help=True,
        epilog=EXIT_CODES,
        context_settings={"help_option_names": ["-h", "--help"]},
        **PLAIN,
    )
    app.callback(epilog=EXIT_CODES)(top)
    return typer.main.get_command(app)


def sub_app() -> typer.Typer:
    """The app of one sub-command, with the settings that all share."""
    return typer.Typer(add_completion=False, **PLAIN)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"monoblock {version('monoblock')}")
        raise typer.Exit


def top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Load, run and chat with models from a folder or the model hub; see `monoblock COMMAND --help`."""
