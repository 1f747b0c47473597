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
from monoblock.cli.ray_options import RayCommand, RayOptions

if TYPE_CHECKING:
    from monoblock.vectors.run import EmbeddingRun, EncodeChunks

app = sub_app()

CHUNK = 32  # batches between two entries of the journal
AHEAD = 2  # chunks that an actor of Ray has, so that it computes while results are written


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


@app.command(cls=RayCommand, epilog=EXIT_CODES)
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
    actors: RayOptions,
    hub: DownloadOptions,
) -> None:
    """Embed texts: one per line of a text file, or a column of a JSONL, CSV or Parquet file.

    The output file appears when it is complete. A run that is interrupted or killed keeps its texts beside it; the same
    command continues there, and the output is the same, byte for byte. `monoblock search` searches it.
    """
    prompts.check()
    actors.check(options.device)
    if source == "-" and sys.stdin.isatty():
        raise typer.BadParameter("an input is needed: monoblock embed texts.txt --model MODEL --output x.npy")
    from monoblock.cli import encoder
    from monoblock.vectors.inputs import TextInput
    from monoblock.vectors.run import started

    texts = TextInput(source, reading.input_format.value if reading.input_format else "", reading.text_column)
    framework = encoder.framework_of(options, "monoblock embed")
    if actors.ray is not None and framework != "pt":
        raise typer.BadParameter(
            f"--ray needs PyTorch, but the framework is {framework}: give --framework pt"
        )
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
            job = _Job(model, options, hub, framework, _encode_options(prompts, vectors), decisive)
            _embed(run, job, actors)
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


@dataclass(frozen=True)
class _Job:
    """What loads the model, and what the vectors depend on."""

    model: str
    options: EncoderOptions
    hub: DownloadOptions
    framework: str
    encode: dict[str, Any]
    decisive: dict[str, Any]

    def description(self, similarity: str) -> dict[str, Any]:
        """How the vectors were made, for the index: `search` loads the same model from it."""
        names = ("dtype", "framework", "quantize", "prompt", "prompt-name", "normalize", "truncate-dim")
        return {
            "model": str(Path(self.model).resolve()) if Path(self.model).is_dir() else self.model,
            "fingerprint": self.decisive["--model"],
            "similarity": similarity,
            **{name.replace("-", "_"): self.decisive[f"--{name}"] for name in names},
        }


def _embed(run: EmbeddingRun, job: _Job, actors: RayOptions) -> None:
    """Encode what is left, in this process or by actors of Ray."""
    if actors.ray is not None:
        _embed_by_actors(run, job, actors.ray, actors.replicas)
        return
    from monoblock.cli import encoder

    loaded = encoder.load(job.model, job.options, job.hub, job.framework, **job.encode)
    loaded.use_threads(run.threads)
    _execute(
        run,
        lambda chunks: ((texts, loaded.encode(texts)) for texts in chunks),
        job,
        loaded.similarity,
        loaded.threads,
    )


def _embed_by_actors(run: EmbeddingRun, job: _Job, address: str, replicas: int | None) -> None:
    import asyncio

    from monoblock.cli.ray_actors import EncoderActor
    from monoblock.cluster.actors import ActorPool, connected

    with connected(address, replicas) as cluster, asyncio.Runner() as runner:
        plan = cluster.plan(replicas, job.options.device, run.threads)
        fixed = (job.model, job.options, job.hub, job.framework, job.encode, job.decisive["--model"])
        make = cluster.starter(EncoderActor, plan, *fixed)
        pool = ActorPool(cluster.ray, make, plan.replicas, AHEAD)
        console.note(plan.summary())
        try:
            similarity, threads = runner.run(pool.start())
            _execute(run, lambda chunks: pool.ordered(runner, "encode", chunks), job, similarity, threads)
        finally:
            runner.run(pool.close())


def _execute(
    run: EmbeddingRun, encode: EncodeChunks, job: _Job, similarity: str, threads: int | None
) -> None:
    chunk = job.options.batch_size * CHUNK
    try:
        with progress(run.total, run.resumed, "texts") as show:
            run.execute_chunks(encode, chunk, job.description(similarity), show, threads)
    except KeyboardInterrupt:
        console.note(f"interrupted: {run.count:,} texts are kept; the same command continues after them")
        raise
