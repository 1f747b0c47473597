"""`monoblock embed`: the embeddings of many texts, in a file."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monoblock.cli import console
from monoblock.cli.app import EXIT_CODES, sub_app
from monoblock.cli.encoder import EncoderOptions, PromptOptions
from monoblock.cli.options import DownloadOptions
from monoblock.cli.progress import progress

if TYPE_CHECKING:
    from monoblock.cli.encoder import Encoder
    from monoblock.vectors.run import EmbeddingRun

app = sub_app()

CHUNK = 32  # batches between two entries of the journal


class InputFormat(StrEnum):
    """Formats of the input."""

    TEXT = "text"
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """How the input is read."""

    input_format: Annotated[
        InputFormat | None,
        typer.Option(help="Default: by the suffix .jsonl, .ndjson, .csv, .tsv or .parquet; else text."),
    ] = None
    text_column: Annotated[
        str | None, typer.Option(help="The field or column with the text; default: text.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class VectorOptions:
    """What is done with the vectors."""

    normalize: Annotated[bool, typer.Option("--normalize", help="Scale each vector to length 1.")] = False
    truncate_dim: Annotated[
        int | None, typer.Option(min=1, help="Keep the first N values of each vector.")
    ] = None


@app.command(epilog=EXIT_CODES)
@console.command
def embed(
    *,
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            show_default=False,
            help="File of texts; - or none: read them from standard input.",
        ),
    ] = "-",
    model: Annotated[str, typer.Option("--model", "-m", help="Folder, or name on the hub.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to create: .npy, .parquet or .jsonl.")
    ],
    reading: InputOptions,
    options: EncoderOptions,
    prompts: PromptOptions,
    vectors: VectorOptions,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard the texts of an unfinished run instead of resuming it.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file.")] = False,
    hub: DownloadOptions,
) -> None:
    """Embed texts: one per line of a text file, or a column of a JSONL, CSV or Parquet file.

    The output file appears when it is complete. A run that is interrupted or killed keeps its texts beside it; the same
    command continues there, and the output is the same, byte for byte. `monoblock search` searches it.
    """
    prompts.check()
    if source == "-" and sys.stdin.isatty():
        raise typer.BadParameter("an input is needed: monoblock embed texts.txt --model MODEL --output x.npy")
    from monoblock.cli import encoder
    from monoblock.vectors.inputs import TextInput
    from monoblock.vectors.run import started

    texts = TextInput(source, reading.input_format.value if reading.input_format else "", reading.text_column)
    framework = encoder.framework_of(options, "monoblock embed")
    decisive: dict[str, Any] = {
        "--model": encoder.identity(model, hub),
        "--framework": framework,
        "--dtype": options.dtype.value,
        "--device": options.device,
        "--quantize": options.quantize.value if options.quantize else None,
        "--batch-size": options.batch_size,
        "--prompt": prompts.prompt,
        "--prompt-name": prompts.prompt_name,
        "--normalize": vectors.normalize,
        "--truncate-dim": vectors.truncate_dim,
        "--input-format": texts.format,
        "--text-column": texts.column,
    }
    with started(texts, output, decisive, restart=restart, force=force) as run:
        if run.resumed:
            console.note(f"{output}: continuing after {run.resumed:,} texts")
        if run.whole:
            run.publish()
        else:
            console.note("loading ...")
            loaded = encoder.load(model, options, hub, framework, **_encode_options(prompts, vectors))
            loaded.use_threads(run.threads)
            _execute(run, loaded, options.batch_size * CHUNK, _description(model, decisive, loaded))
        if run.truncated:
            console.note(
                f"{run.truncated:,} of {run.count:,} texts were longer than the model takes: cut off"
            )
        console.rows(str(output), [("texts", f"{run.count:,}"), ("width", str(run.width))])


def _encode_options(prompts: PromptOptions, vectors: VectorOptions) -> dict[str, Any]:
    """Arguments of `encode`."""
    return {
        "prompt": prompts.prompt,
        "prompt_name": prompts.prompt_name,
        "normalize_embeddings": vectors.normalize,
        "truncate_dim": vectors.truncate_dim,
    }


def _description(model: str, decisive: dict[str, Any], loaded: Encoder) -> dict[str, Any]:
    """How the vectors were made, for the index: `search` loads the same model from it."""
    names = ("dtype", "framework", "quantize", "prompt", "prompt-name", "normalize", "truncate-dim")
    return {
        "model": str(Path(model).resolve()) if Path(model).is_dir() else model,
        "fingerprint": decisive["--model"],
        "similarity": loaded.similarity,
        **{name.replace("-", "_"): decisive[f"--{name}"] for name in names},
    }


def _execute(run: EmbeddingRun, loaded: Encoder, chunk: int, description: dict[str, Any]) -> None:
    try:
        with progress(run.total, run.resumed, "texts") as show:
            run.execute(loaded.encode, chunk, description, show, loaded.threads)
    except KeyboardInterrupt:
        console.note(f"interrupted: {run.count:,} texts are kept; the same command continues after them")
        raise
