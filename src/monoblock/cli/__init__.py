"""The command `monoblock`. The module of a subcommand is imported when it is run or listed."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with one of the codes of docs/cli.md."""
    try:
        from monoblock.cli.app import command

        command()(prog_name="monoblock")
    except KeyboardInterrupt:  # outside a subcommand, which handles its own
        sys.exit(130)
