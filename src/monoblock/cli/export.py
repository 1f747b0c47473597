"""`monoblock export`: write a model as ONNX or OpenVINO files."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from monoblock.cli import console
from monoblock.cli.app import EXIT_CODES, sub_app
from monoblock.cli.options import DownloadOptions
from monoblock.cli.progress import phases

if TYPE_CHECKING:
    from monoblock.conversion.onnx import Exported

app = sub_app()


class ExportTask(StrEnum):
    """Tasks, by optimum's names."""

    FEATURE_EXTRACTION = "feature-extraction"
    FILL_MASK = "fill-mask"
    TEXT_GENERATION = "text-generation"
    TEXT_GENERATION_WITH_PAST = "text-generation-with-past"
    TEXT_CLASSIFICATION = "text-classification"
    TOKEN_CLASSIFICATION = "token-classification"
    QUESTION_ANSWERING = "question-answering"
    MULTIPLE_CHOICE = "multiple-choice"


class ExportFormat(StrEnum):
    """Formats of graphs."""

    ONNX = "onnx"
    OPENVINO = "openvino"


class GraphQuantize(StrEnum):
    """Quantised types of a graph's matrices."""

    INT8 = "int8"


@app.command(epilog=EXIT_CODES)
@console.command
def export(
    *,
    model: Annotated[str, typer.Argument(help="Folder, GGUF file, or name on the hub.")],
    out: Annotated[str, typer.Argument(help="The folder to create.")],
    task: Annotated[
        ExportTask | None, typer.Option(help="What the graph computes; default: by the class in config.json.")
    ] = None,
    form: Annotated[ExportFormat, typer.Option("--format", help="Format of the graph.")] = ExportFormat.ONNX,
    quantize: Annotated[
        GraphQuantize | None, typer.Option(help="Quantise the matrices of an ONNX file.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the target folder; the files in it are deleted.")
    ] = False,
    hub: DownloadOptions,
) -> None:
    """Export a model as an ONNX or OpenVINO graph, into a new folder that optimum and sentence-transformers open.

    The written file is run and compared with the model; the summary gives the largest difference. The folder is created
    atomically, when it is complete.
    """
    from monoblock.checkpoint.options import HubOptions
    from monoblock.conversion.onnx import ExportOptions, check_options, export_onnx

    options = ExportOptions(
        task=task.value if task else None,
        format=form.value,
        quantize=quantize.value if quantize else None,
        force=force,
        hub=HubOptions(**hub.kwargs()),
    )
    try:
        check_options(options)
    except ValueError as error:
        raise typer.BadParameter(str(error).replace("quantize='int8'", "--quantize int8")) from None
    with phases() as progress:
        result = export_onnx(model, out, options, progress)
    _show(result, out, options.quantize)


def _show(result: Exported, target: str, quantized: str | None) -> None:
    found = result.comparison
    check = f"differ by at most {found.difference:.3g} (largest magnitude: {found.magnitude:.3g})"
    if found.agreement is not None:
        check += f"; same argmax at {found.agreement:.1%}"
    shapes = ", ".join("x".join(map(str, shape)) for shape in found.shapes)
    cached = [name for name in result.inputs if name.startswith("past_key_values.")]
    inputs = [name for name in result.inputs if name not in cached]
    outputs = [name for name in result.outputs if not name.startswith("present.")]
    lines = [
        ("task", result.task),
        ("class", result.architecture),
        ("format", result.format + (f", {quantized}" if quantized else ", float32")),
        ("inputs", ", ".join(inputs + ([f"{cached[0]} ... {cached[-1]}"] if cached else []))),
        ("outputs", ", ".join(outputs + (["present.0.key ..."] if cached else []))),
        ("outputs compared", check),
        ("shapes compared", f"{shapes} (rows x cached tokens x new tokens)"),
        ("files", ", ".join(result.files)),
    ]
    console.rows(target, lines)
