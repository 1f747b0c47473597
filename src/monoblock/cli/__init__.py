"""The command `monoblock`. A sub-command's module is imported when it is run or listed."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line and ends the process with one of the exit codes of docs/cli.md."""
    try:
        from monoblock.cli.app import command

        command()(prog_name="monoblock")
    except KeyboardInterrupt:  # before or after the sub-command itself, which handles its own
        sys.exit(130)
