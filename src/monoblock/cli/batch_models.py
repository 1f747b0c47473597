"""The models of `monoblock batch`: their options, and what its results depend on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monoblock.cli.options import DownloadOptions, Dtype, Quantize, Speculation, SpeculationOption
from monoblock.texts import read_text

if TYPE_CHECKING:
    from monoblock.cli.shards import ProcessOptions
    from monoblock.serving.server.registry import ModelEntry
    from monoblock.serving.server.settings import ServerSettings

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
    speculation: SpeculationOption = Speculation.OFF
    allow_files: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Read images of file: URLs below this folder.")
    ] = None


def entries(models: BatchModelOptions, hub: DownloadOptions) -> list[ModelEntry]:
    """The models of the options."""
    from monoblock.serving.server.registry import entries_of

    sources: list[str | None] = [*models.model] if models.model else [None]
    return entries_of(sources, models.name or [], models.adapter or [], hub.kwargs())


def settings(
    models: BatchModelOptions, hub: DownloadOptions, processes: ProcessOptions | None = None
) -> ServerSettings:
    """The settings of a server without other clients. `processes`: of the model that generates text."""
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
            speculation=models.speculation.value,
        ),
        loading={
            "dtype": models.dtype.value,
            "device": models.device,
            "quantize": None if models.quantize is None else models.quantize.value,
        },
        tensor_parallel=1 if processes is None else processes.tensor_parallel,
        pipeline_parallel=1 if processes is None else processes.pipeline_parallel,
        hub=hub.kwargs(),
    )


def decisive(entries: list[ModelEntry], models: BatchModelOptions, hub: DownloadOptions) -> str:
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
