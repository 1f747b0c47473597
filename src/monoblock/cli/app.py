"""The top-level command: subcommands are imported lazily."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
import typer.core
import typer.main

# Modules of this package, each with an `app`, in the order of `monoblock --help`.
COMMANDS = (
    "generate",
    "chat",
    "embed",
    "search",
    "attention",
    "info",
    "plan",
    "convert",
    "export",
    "quantize",
    "finetune",
    "evaluate",
    "serve",
    "batch",
    "bench",
    "env",
)

# Plain help instead of rich panels: twice as fast, and the same in a pipe.
PLAIN: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False}

EXIT_CODES = (
    "Exit codes: 0 success; 1 error of the model, its files or the hub (a message on stderr); "
    "2 usage error; 130 interrupted by Ctrl-C; 141 broken pipe: the reader of the output exited."
)


class LazyGroup(typer.core.TyperGroup):
    """A command group that imports the module of a command when the command is requested."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.commands = dict.fromkeys(COMMANDS)  # type: ignore[assignment]  # only the names are read

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name; None if there is none (click then reports a usage error)."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"monoblock.cli.{cmd_name}")
        command = typer.main.get_command(module.app)
        command.name = cmd_name
        return command


def command() -> Any:
    """The command line as a callable."""
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
    """A typer app for one subcommand, with the shared settings."""
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
