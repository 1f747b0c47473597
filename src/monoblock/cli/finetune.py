"""`monoblock finetune`: fine-tune a model on a file."""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monoblock.cli import console
from monoblock.cli.app import EXIT_CODES, sub_app
from monoblock.training.options import KINDS, TrainingOptions, help_of, read_recipe, write_recipe

if TYPE_CHECKING:
    from monoblock.training.processes import Processes
    from monoblock.training.trainer import Progress, Sample

app = sub_app()

SIGNALLED = 128  # plus the number of the signal: the exit code of a run that ended with a checkpoint

_SHORT = {"model": "-m", "output": "-o", "task": "-t", "data": "-d", "batch_size": "-b"}
_ANNOTATED: Any = Annotated
_PAUSE = 10.0  # seconds between lines of progress outside a terminal


def argument(name: str) -> tuple[str, Any, Any]:
    """An option of the command line, which is None if it is not given."""
    kind = KINDS[name]
    flag = f"--{name.replace('_', '-')}"
    if kind is bool:
        declared: Any = typer.Option(f"{flag}/--no-{name.replace('_', '-')}", help=help_of(name))
        return name, Annotated[bool | None, declared], field(default=None)
    names = [flag, *([_SHORT[name]] if name in _SHORT else [])]
    if kind == tuple[str, ...]:
        declared = typer.Option(*names, help=f"{help_of(name)} May be given several times.")
        return name, Annotated[list[str] | None, declared], field(default=None)
    plain: Any = next(one for one in (str, int, float) if kind is one or kind == one | None)
    declared = typer.Option(*names, help=help_of(name), show_default=False)
    return name, _ANNOTATED[plain | None, declared], field(default=None)


if TYPE_CHECKING:
    Arguments = Any
else:
    Arguments = make_dataclass("Arguments", [argument(name) for name in KINDS], frozen=True, kw_only=True)


@app.command(epilog=EXIT_CODES)
@console.command
def finetune(
    *,
    given: Arguments,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file of options, which those of the command line override.")
    ] = None,
    show_recipe: Annotated[
        bool, typer.Option("--show-recipe", help="Print a recipe with all options, and exit.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue after the output's last checkpoint, if there is one.")
    ] = False,
) -> None:
    """Fine-tune a model on a file of texts, conversations or labelled examples.

    The output folder receives the model, its metrics and a picture of their curves, and the checkpoints. Ctrl-C ends
    the run with a checkpoint; the same command with --resume continues there, and ends with the same weights.
    `torchrun --nproc-per-node N -m monoblock finetune ...` trains in N processes.
    """
    from monoblock.training.processes import processes, reports

    values = {name: value for name, value in vars(given).items() if value is not None}
    with _reported_by(lambda: reports(values.get("framework", "pt"))):
        if recipe is not None:
            values = read_recipe(recipe) | values
        try:
            options = TrainingOptions(**values)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        if show_recipe:
            console.write(write_recipe(options))
            return
        for name in ("data", "output"):
            if getattr(options, name) is None:
                raise typer.BadParameter(f"--{name} is needed")
        among = processes(options)
    try:
        _train(options, among, resume)
    except (typer.Exit, KeyboardInterrupt):
        raise
    except Exception as error:
        if among.size == 1:
            raise
        message = among.failure(error)
        if message is None:
            raise typer.Exit(console.FAILURE) from None
        raise (error if message == str(error) else RuntimeError(message)) from error
    finally:
        among.leave()


@contextmanager
def _reported_by(this: Callable[[], bool]) -> Generator[None]:
    """Errors of the block, which several processes find alike, end this one without a message unless it reports
    them."""
    try:
        yield
    except typer.Exit:
        raise
    except Exception as error:
        if this():
            raise
        raise typer.Exit(2 if isinstance(error, typer.BadParameter) else console.FAILURE) from None


def _train(options: TrainingOptions, among: Processes, resume: bool) -> None:
    from monoblock.training.trainer import Trainer

    if not among.first:
        logging.getLogger("monoblock").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
    trainer = Trainer(options, among)
    if not among.first:
        result = trainer.train(resume=resume)
        if result.interrupted is not None:
            raise typer.Exit(SIGNALLED + result.interrupted)
        return
    console.note("loading ..." if among.size == 1 else f"loading in {among.size} processes ...")
    with _progress() as show:
        result = trainer.train(resume=resume, show=show, show_sample=_show_sample)
    if result.interrupted is not None:
        console.note(
            f"interrupted: a checkpoint of step {result.step} is in {result.output}; --resume continues there"
        )
        raise typer.Exit(SIGNALLED + result.interrupted)
    early = " (stopped early)" if result.stopped_early else ""
    pairs = [("steps", f"{result.step:,}{early}"), ("loss", f"{result.loss:.4f}")]
    pairs += [(f"evaluation {name}", f"{value:.4f}") for name, value in result.metrics.items()]
    console.rows(str(result.output), pairs)


def _show_sample(sample: Sample) -> None:
    console.note(f"step {sample.step:,}, {sample.prompt!r}: {sample.text!r}")


@contextmanager
def _progress() -> Generator[Callable[[Progress], None]]:
    """A function that shows loss, speed and the time that is left: in a bar, or now and then in a line."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("", total=None, state="")

        def show(progress: Progress) -> None:
            bars.update(bar, completed=progress.step, total=progress.steps, state=_described(progress))

        yield show


def _lines() -> Callable[[Progress], None]:
    last = -math.inf

    def show(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= _PAUSE or progress.step == progress.steps:
            last = time.monotonic()
            console.note(f"step {progress.step:,} of {progress.steps:,}, {_described(progress)}")

    return show


def _described(progress: Progress) -> str:
    minutes, seconds = divmod(round(progress.seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    left = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
    return f"loss {progress.loss:.4f}, {progress.tokens_per_second:,.0f} tokens/s, {left} left"


__all__ = ["app", "argument", "finetune"]
