"""The progress bar of pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def with_progress_bar(answers: Iterator[Any], total: int | None, wanted: bool | None) -> Iterator[Any]:
    """The same iterator, with a progress bar on stderr that is removed at the end.

    `wanted`: None shows it on a terminal, for more than one input.
    """
    if wanted is False or (wanted is None and total is not None and total < 2):
        return answers
    from rich.console import Console

    console = Console(stderr=True)
    if wanted is None and not console.is_terminal:
        return answers
    return _tracked(answers, total, console)


def _tracked(answers: Iterator[Any], total: int | None, console: Any) -> Iterator[Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield from bar.track(answers, total=total)
