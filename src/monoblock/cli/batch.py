"""`monoblock batch`: many requests of a file, in OpenAI's batch format."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from monoblock.cli import batch_models, console
from monoblock.cli.app import EXIT_CODES, sub_app
from monoblock.cli.batch_models import BatchModelOptions
from monoblock.cli.options import DownloadOptions
from monoblock.cli.progress import progress
from monoblock.cli.ray_options import RayCommand, RayOptions
from monoblock.cli.shards import ProcessOptions

if TYPE_CHECKING:
    from monoblock.serving.batch import Answering, BatchCounts
    from monoblock.serving.batch_files import BatchResults
    from monoblock.serving.server.registry import ModelEntry
    from monoblock.serving.server.settings import ServerSettings

app = sub_app()

FREE_SHARE = 4  # as of an engine by default: the cache takes a quarter of the memory


@app.command(cls=RayCommand, epilog=EXIT_CODES)
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
    processes: ProcessOptions,
    actors: RayOptions,
    hub: DownloadOptions,
) -> None:
    """Answer the requests of a file, in OpenAI's batch format: chat, completions, embeddings, responses.

    A result is written when it is finished, so the order is another one: match them by custom_id. A run that is
    interrupted or killed keeps its results; the same command continues with the rest. A request that cannot be answered
    has an error as its result.
    """
    if restart and retry_failed:
        raise typer.BadParameter("give --restart or --retry-failed, not both")
    actors.check(models.device)
    processes.refuse(ray=actors.ray, adapter=models.adapter)
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

    need_pytorch("monoblock batch")
    found = batch_models.entries(models, hub)
    processes.check(found, hub)
    options = batch_models.decisive(found, models, hub)
    with BatchResults.opened(output, restart=restart, retry=retry_failed) as results:
        counts = _run(source, results, options, _answering(found, models, hub, options, actors, processes))
    if counts.failed:
        console.note(f"{counts.failed:,} of {counts.total:,} requests failed: their results have the error")
    console.rows(str(output), [("requests", f"{counts.total:,}"), ("failed", f"{counts.failed:,}")])


def _answering(
    found: list[ModelEntry],
    models: BatchModelOptions,
    hub: DownloadOptions,
    options: str,
    actors: RayOptions,
    processes: ProcessOptions,
) -> Callable[[], AbstractAsyncContextManager[Answering]]:
    """What loads the models and answers requests: this process, or actors of Ray."""
    from monoblock.serving.batch import answers

    settings = batch_models.settings(models, hub, processes)

    def here() -> AbstractAsyncContextManager[Answering]:
        console.note("loading ...")
        return answers(found, settings)

    if (address := actors.ray) is None:
        return here
    return lambda: _by_actors(address, actors.replicas, models, hub, settings, options)


@asynccontextmanager
async def _by_actors(
    address: str,
    replicas: int | None,
    models: BatchModelOptions,
    hub: DownloadOptions,
    settings: ServerSettings,
    options: str,
) -> AsyncGenerator[Answering]:
    from monoblock.cli.ray_actors import BatchActor
    from monoblock.cluster.actors import ActorPool, connected
    from monoblock.serving.batch import Answering, most_requests

    console.note("loading ...")
    with connected(address, replicas) as cluster:
        plan = cluster.plan(replicas, models.device)
        if settings.engine.cache_memory is None and plan.memory and not plan.gpu:
            # The default of one process would be that of each of the machine's actors.
            share = plan.memory // FREE_SHARE
            settings = replace(settings, engine=replace(settings.engine, cache_memory=share))
        most = most_requests(settings)
        # One call more than the requests, so that `load` and these do not wait for each other.
        make = cluster.starter(BatchActor, plan, models, hub, settings, options, calls=most + 1)
        pool = ActorPool(cluster.ray, make, plan.replicas, most)
        console.note(plan.summary())
        try:
            await pool.start()
            yield Answering(lambda line: pool.call("answer", line), pool.capacity)
        finally:
            await pool.close()


def _run(
    source: Path,
    results: BatchResults,
    options: str,
    answering: Callable[[], AbstractAsyncContextManager[Answering]],
) -> BatchCounts:
    import asyncio

    from monoblock.serving.batch import run_batch

    if results.done:
        console.note(f"{results.path}: continuing after {len(results.done):,} results")
    try:
        with progress(None, len(results.done), "requests") as show:
            return asyncio.run(run_batch(source, results, options, show, answering))
    except KeyboardInterrupt:
        console.note(
            f"interrupted: {len(results.done):,} results are kept; the same command continues after them"
        )
        raise
