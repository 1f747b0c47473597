"""Progress of long runs on stderr: a bar at a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from monoblock.cli import console

_PAUSE = 10.0  # seconds between progress lines outside a terminal


@contextmanager
def progress(total: int | None, resumed: int, unit: str) -> Generator[Callable[..., None]]:
    """A function that reports how many are done, `show(done)` or `show(done, total)`. `resumed`: of an earlier run,
    which do not count for the speed."""
    if not sys.stderr.isatty():
        yield _lines(total, resumed, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar, begin = bars.add_task("", total=total, completed=resumed, speed=""), time.monotonic()

        def show(done: int, total: int | None = total) -> None:
            bars.update(bar, completed=done, total=total, speed=_speed(done - resumed, begin, unit))

        yield show


def _lines(total: int | None, resumed: int, unit: str) -> Callable[..., None]:
    begin = last = time.monotonic()

    def show(done: int, total: int | None = total) -> None:
        nonlocal last
        if time.monotonic() - last >= _PAUSE:
            last = time.monotonic()
            of = "" if total is None else f" of {total:,}"
            console.note(f"{done:,}{of} {unit}, {_speed(done - resumed, begin, unit)}")

    return show


def _speed(count: int, begin: float, unit: str) -> str:
    return f"{count / max(time.monotonic() - begin, 1e-9):,.0f} {unit}/s"


@contextmanager
def phases() -> Generator[Callable[[int, int, str], None]]:
    """A function `show(done, total, phase)`: a bar for each phase at a terminal, else a line at its start and at its
    end."""
    if not sys.stderr.isatty():
        yield _phase
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        steps: dict[str, Any] = {}

        def show(done: int, of: int, what: str) -> None:
            if what not in steps:
                steps[what] = bars.add_task(what, total=of)
            bars.update(steps[what], completed=done)

        yield show


def _phase(done: int, of: int, what: str) -> None:
    if done in (0, of):
        console.note(f"{what}: done" if done else f"{what} ...")
