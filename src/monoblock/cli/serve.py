"""`monoblock serve`: OpenAI's API over HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from monoblock.cli import console
from monoblock.cli.app import EXIT_CODES, sub_app
from monoblock.cli.options import DownloadOptions, Dtype, Quantize, Speculation, SpeculationOption
from monoblock.cli.ray_options import RayCommand, RayOptions
from monoblock.cli.shards import ProcessOptions
from monoblock.texts import read_text

if TYPE_CHECKING:
    from monoblock.serving.server.settings import ServerSettings

app = sub_app()

KEY = "MONOBLOCK_API_KEY"
MEGABYTE = 10**6


@app.command(cls=RayCommand, epilog=EXIT_CODES)
@console.command
def serve(
    *,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Folders, or names on the hub; default: the embedded demo model.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Name of a model, in the order of the models; may be repeated.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A LoRA adapter, served as a model; may be repeated."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="0: a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            help=f"Key that requests must send; better as the environment variable {KEY}.", show_default=False
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin of web pages that may use the server, such as https://example.com; may be repeated."
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Further name of this machine in requests, for a proxy before a loopback address."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights; auto: as stored.")] = Dtype.AUTO,
    device: Annotated[
        str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    ] = "auto",
    quantize: Annotated[
        Quantize | None,
        typer.Option(help="Quantise the weights while loading: int8, int4, or lossless (12 bits)."),
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="File with a chat template (Jinja) for models that have none.")
    ] = None,
    generation_config: Annotated[
        bool, typer.Option(help="Take defaults of sampling from the model's generation_config.json.")
    ] = True,
    preload: Annotated[bool, typer.Option("--preload", help="Load all models at the start.")] = False,
    idle_timeout: Annotated[
        float | None, typer.Option(min=0, help="Unload a model after so many seconds without a request.")
    ] = None,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests get after SIGTERM or Ctrl-C.")
    ] = 30.0,
    cache_memory: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="MB", help="Memory of a model's KV cache; default: a quarter of what is free."
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a prompt and its continuation; default: the model's context."),
    ] = None,
    max_sequences: Annotated[int, typer.Option(min=1, help="Sequences that are computed at once.")] = 64,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Requests that wait; more are refused (429).")
    ] = 1024,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="New tokens of a request at most.")
    ] = None,
    prefix_cache: Annotated[
        bool | None,
        typer.Option(help="Keep the cache of earlier prompts for later ones; default: where it is possible."),
    ] = None,
    speculation: SpeculationOption = Speculation.OFF,
    speculation_cache: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="TOKENS",
            help="Tokens of finished requests that suffix searches; 0: none of them; default: 200000.",
        ),
    ] = None,
    processes: ProcessOptions,
    actors: RayOptions,
    max_replicas: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --ray: replicas under load at most; --replicas is the least number then."
        ),
    ] = None,
    max_body: Annotated[int, typer.Option(min=1, metavar="MB", help="Size of a request.")] = 16,
    max_image_pixels: Annotated[
        int, typer.Option(min=1, metavar="MILLIONS", help="Pixels of an image.")
    ] = 32,
    request_timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may take.")] = 3600.0,
    allow_files: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Read images of file: URLs below this folder.")
    ] = None,
    allow_fetch: Annotated[
        bool, typer.Option("--allow-fetch", help="Fetch images of http(s): URLs.")
    ] = False,
    hub: DownloadOptions,
) -> None:
    """Serve models with OpenAI's API: text generation, embeddings, reranking and classification.

    The first line on standard output has the address, at which a page to chat is. A single model is loaded at the
    start, several when they are first asked for. SIGTERM and Ctrl-C end the server when its requests are finished; a
    second signal ends it at once.
    """
    key = api_key if api_key is not None else os.environ.get(KEY)
    if key is not None and not key.strip():
        raise typer.BadParameter("the API key is empty", param_hint="--api-key")
    if adapter and not all("=" in text for text in adapter):
        raise typer.BadParameter("an adapter is given as NAME=PATH", param_hint="--adapter")
    if allow_files is not None and not allow_files.is_dir():
        raise typer.BadParameter(f"{allow_files} is not a folder", param_hint="--allow-files")
    actors.check(device)
    if max_replicas is not None and (actors.ray is None or max_replicas < (actors.replicas or 1)):
        raise typer.BadParameter("--max-replicas needs --ray, and is at least --replicas")
    processes.refuse(adapter=adapter, prefix_cache=prefix_cache, ray=actors.ray)
    from monoblock.serving.engine.options import EngineOptions
    from monoblock.serving.server.settings import Limits, ServerSettings

    settings = ServerSettings(
        host=host,
        port=port,
        api_key=key,
        cors_origins=tuple(cors_origin or ()),
        hosts=tuple(allowed_host or ()),
        allow_files=allow_files,
        allow_fetch=allow_fetch,
        idle_timeout=idle_timeout,
        drain_timeout=drain_timeout,
        chat_template=None if chat_template is None else read_text(chat_template),
        use_generation_config=generation_config,
        preload=preload,
        limits=Limits(
            body=max_body * 2**20,
            new_tokens=max_new_tokens,
            image_pixels=max_image_pixels * 10**6,
            request_seconds=request_timeout,
            waiting=max_waiting,
        ),
        engine=EngineOptions(
            cache_memory=None if cache_memory is None else cache_memory * MEGABYTE,
            max_model_len=max_model_len,
            max_sequences=max_sequences,
            max_waiting=max_waiting,
            prefix_cache=prefix_cache is not False,
            speculation=speculation.value,
            **({} if speculation_cache is None else {"speculation_cache": speculation_cache}),
        ),
        loading={
            "dtype": dtype.value,
            "device": device,
            "quantize": None if quantize is None else quantize.value,
        },
        tensor_parallel=processes.tensor_parallel,
        pipeline_parallel=processes.pipeline_parallel,
        hub=hub.kwargs(),
    )
    sources: list[str | None] = [*models] if models else [None]
    _run(sources, name or [], adapter or [], settings, hub, processes, actors, max_replicas)


def _run(
    sources: list[str | None],
    names: list[str],
    adapters: list[str],
    settings: ServerSettings,
    hub: DownloadOptions,
    processes: ProcessOptions,
    actors: RayOptions,
    most: int | None,
) -> None:
    """Serve until a signal. Exit code 130 after Ctrl-C. With the demo, the embedded search model is served too."""
    from monoblock import demo_embeddings
    from monoblock.serving.server.app import ServerApp
    from monoblock.serving.server.kinds import ModelKind
    from monoblock.serving.server.registry import ModelEntry, entries_of
    from monoblock.serving.server.running import serve as run

    entries = entries_of(sources, names, adapters, settings.hub)
    processes.check(entries, hub)
    if sources == [None] and all(entry.name != demo_embeddings.NAME for entry in entries):
        entries.append(ModelEntry(demo_embeddings.NAME, demo_embeddings.NAME, ModelKind.EMBED, extra=True))
    if not settings.loopback and settings.api_key is None:
        console.note(f"warning: everybody who reaches {settings.host} can use this server: give an --api-key")
    named = ", ".join(entry.name for entry in entries if not entry.extra)

    def listening(address: str) -> None:
        print(f"monoblock serves {named} on {address}", flush=True)

    if actors.ray is not None:
        from monoblock.cli import ray_serve

        found = ray_serve.run(
            actors.ray, actors.replicas, most, (sources, names, adapters), settings, listening
        )
    else:
        found = run(ServerApp(entries, settings), listening)
    if found:
        raise typer.Exit(console.INTERRUPTED)
