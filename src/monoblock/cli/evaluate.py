"""`monoblock evaluate`: the loss and the metrics of a model on a file."""

from __future__ import annotations

import json
from dataclasses import make_dataclass
from typing import TYPE_CHECKING, Any

import typer

from monoblock.cli import console
from monoblock.cli.app import EXIT_CODES, sub_app
from monoblock.cli.finetune import argument
from monoblock.cli.options import Json
from monoblock.cli.progress import progress
from monoblock.training.options import EVALUATION, TrainingOptions

app = sub_app()

if TYPE_CHECKING:
    EvaluationArguments = Any
else:
    EvaluationArguments = make_dataclass(
        "EvaluationArguments", [argument(name) for name in EVALUATION], frozen=True, kw_only=True
    )


@app.command(epilog=EXIT_CODES)
@console.command
def evaluate(*, given: EvaluationArguments, as_json: Json = False) -> None:
    """Evaluate a model on a file of texts, conversations or labelled examples.

    The loss is the mean over all labels; the other metrics depend on the task.
    """
    values = {name: value for name, value in vars(given).items() if value is not None}
    try:
        options = TrainingOptions(**values)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if options.data is None:
        raise typer.BadParameter("--data is needed")
    from monoblock.training.trainer import evaluate_file

    console.note("loading ...")
    with progress(None, 0, "examples") as show:
        found = evaluate_file(options, show)
    if as_json:
        console.write(json.dumps(found) + "\n")
    else:
        console.rows(options.data, [(name, f"{value:.4f}") for name, value in found.items()])
