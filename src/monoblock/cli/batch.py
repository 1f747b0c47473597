"""`monoblock batch`: many requests of a file, in OpenAI's batch format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monoblock.cli import console
from monoblock.cli.app import EXIT_CODES, sub_app
from monoblock.cli.options import DownloadOptions, Dtype, Quantize
from monoblock.cli.progress import progress
from monoblock.texts import read_text

if TYPE_CHECKING:
    from monoblock.serving.batch import BatchCounts
    from monoblock.serving.batch_files import BatchResults
    from monoblock.serving.server.registry import ModelEntry
    from monoblock.serving.server.settings import ServerSettings

app = sub_app()

MEGABYTE = 10**6
FOREVER = 10**9  # seconds, and waiting requests: a batch has no other clients


@dataclass(frozen=True, kw_only=True)
class BatchModelOptions:
    """The models and how they are loaded."""

    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="Folder, or name on the hub; may be repeated; default: the embedded demo model.",
            show_default=False,
        ),
    ] = None
    name: Annotated[
        list[str] | None,
        typer.Option(help="Name of a model in the requests, in the order of the models; may be repeated."),
    ] = None
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A LoRA adapter, as a model of that name; may be repeated."),
    ] = None
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights; auto: as stored.")] = Dtype.AUTO
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")] = "auto"
    quantize: Annotated[
        Quantize | None,
        typer.Option(help="Quantise the weights while loading: int8, int4, or lossless (12 bits)."),
    ] = None
    chat_template: Annotated[
        Path | None, typer.Option(help="File with a chat template (Jinja) for models that have none.")
    ] = None
    generation_config: Annotated[
        bool, typer.Option(help="Take defaults of sampling from the model's generation_config.json.")
    ] = True
    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a prompt and its continuation; default: the model's context."),
    ] = None
    cache_memory: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="MB", help="Memory of a model's KV cache; default: a quarter of what is free."
        ),
    ] = None
    max_sequences: Annotated[int, typer.Option(min=1, help="Sequences that are computed at once.")] = 64
    allow_files: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Read images of file: URLs below this folder.")
    ] = None


@app.command(epilog=EXIT_CODES)
@console.command
def batch(
    *,
    source: Annotated[
        Path, typer.Argument(metavar="IN.jsonl", show_default=False, help="File with a request per line.")
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUT.jsonl", show_default=False, help="File for a result per line.")
    ],
    models: BatchModelOptions,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard the results that the output file has.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Answer the requests again whose results are errors.")
    ] = False,
    hub: DownloadOptions,
) -> None:
    """Answer the requests of a file, in OpenAI's batch format: chat, completions, embeddings, responses.

    A result is written when it is finished, so the order is another one: match them by custom_id. A run that is
    interrupted or killed keeps its results; the same command continues with the rest. A request that cannot be answered
    has an error as its result.
    """
    if restart and retry_failed:
        raise typer.BadParameter("give --restart or --retry-failed, not both")
    if not source.is_file():
        raise typer.BadParameter(f"{source} is not a file", param_hint="IN.jsonl")
    if output.resolve() == source.resolve():
        raise typer.BadParameter("the input cannot be the output too", param_hint="OUT.jsonl")
    if models.adapter and not all("=" in text for text in models.adapter):
        raise typer.BadParameter("an adapter is given as NAME=PATH", param_hint="--adapter")
    if models.allow_files is not None and not models.allow_files.is_dir():
        raise typer.BadParameter(f"{models.allow_files} is not a folder", param_hint="--allow-files")
    from monoblock.cli.engine import need_pytorch
    from monoblock.serving.batch_files import BatchResults
    from monoblock.serving.server.registry import entries_of

    need_pytorch("monoblock batch")
    sources: list[str | None] = [*models.model] if models.model else [None]
    entries = entries_of(sources, models.name or [], models.adapter or [], hub.kwargs())
    options = _decisive(entries, models, hub)
    with BatchResults.opened(output, restart=restart, retry=retry_failed) as results:
        counts = _run(source, results, entries, _settings(models, hub), options)
    if counts.failed:
        console.note(f"{counts.failed:,} of {counts.total:,} requests failed: their results have the error")
    console.rows(str(output), [("requests", f"{counts.total:,}"), ("failed", f"{counts.failed:,}")])


def _settings(models: BatchModelOptions, hub: DownloadOptions) -> ServerSettings:
    from monoblock.serving.engine.options import EngineOptions
    from monoblock.serving.server.settings import Limits, ServerSettings

    template = models.chat_template
    return ServerSettings(
        chat_template=None if template is None else read_text(template),
        use_generation_config=models.generation_config,
        allow_files=models.allow_files,
        limits=Limits(body=2**30, request_seconds=FOREVER, waiting=FOREVER),
        engine=EngineOptions(
            cache_memory=None if models.cache_memory is None else models.cache_memory * MEGABYTE,
            max_model_len=models.max_model_len,
            max_sequences=models.max_sequences,
            max_waiting=FOREVER,
        ),
        loading={
            "dtype": models.dtype.value,
            "device": models.device,
            "quantize": None if models.quantize is None else models.quantize.value,
        },
        hub=hub.kwargs(),
    )


def _decisive(entries: list[ModelEntry], models: BatchModelOptions, hub: DownloadOptions) -> str:
    """What a result depends on beside its request, as a text: the models' files and how they are loaded."""
    from monoblock.checkpoint.fingerprint import fingerprint
    from monoblock.checkpoint.hub import HubOptions
    from monoblock.vectors.identity import model_fingerprint

    def adapter(path: str | None) -> Any:
        folder = Path(path or "")
        if path is None or not folder.is_dir():
            return path
        return {file.name: fingerprint(file) for file in sorted(folder.glob("adapter_*"))}

    found: dict[str, Any] = {
        "dtype": models.dtype.value,
        "quantize": models.quantize.value if models.quantize else None,
        "chat_template": None if models.chat_template is None else read_text(models.chat_template),
        "generation_config": models.generation_config,
        "max_model_len": models.max_model_len,
        "models": {
            entry.name: [
                None if entry.source is None else model_fingerprint(entry.source, HubOptions(**hub.kwargs())),
                adapter(entry.adapter),
            ]
            for entry in entries
        },
    }
    return json.dumps(found, sort_keys=True)


def _run(
    source: Path,
    results: BatchResults,
    entries: list[ModelEntry],
    settings: ServerSettings,
    options: str,
) -> BatchCounts:
    import asyncio

    from monoblock.serving.batch import run_batch

    if results.done:
        console.note(f"{results.path}: continuing after {len(results.done):,} results")
    try:
        with progress(None, len(results.done), "requests") as show:
            return asyncio.run(
                run_batch(
                    source,
                    results,
                    entries,
                    settings,
                    options,
                    show,
                    lambda: console.note("loading ..."),
                )
            )
    except KeyboardInterrupt:
        console.note(
            f"interrupted: {len(results.done):,} results are kept; the same command continues after them"
        )
        raise
