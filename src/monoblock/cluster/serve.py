"""The server as an application of Ray Serve: a front, and replicas that each hold the models.

    serve run monoblock.cluster.serve:build_app models=my-model replicas=2

Ray Serve restarts replicas that die or are not healthy, and adds and removes them with the load. A replica is the
application of `monoblock serve`; the router (`router.py`) keeps conversations on one replica, and the front
(`front.py`) gives the requests of one that dies to another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ray import serve  # pyright: ignore[reportMissingImports]
from ray.exceptions import (  # pyright: ignore[reportMissingImports]
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)
from ray.serve.config import RequestRouterConfig  # pyright: ignore[reportMissingImports]
from ray.serve.exceptions import (  # pyright: ignore[reportMissingImports]
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)

from monoblock.cluster.actors import available_threads, prepare
from monoblock.cluster.front import Front, Replicas
from monoblock.cluster.router import PrefixRouter
from monoblock.serving.engine.options import EngineOptions
from monoblock.serving.server.registry import ModelEntry, entries_of
from monoblock.serving.server.settings import Limits, ServerSettings

DEAD = (
    RayActorError,
    WorkerCrashedError,
    OutOfMemoryError,
    ObjectLostError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
Sources = tuple[list[str | None], list[str], list[str]]  # models, their names, and adapters: of `entries_of`
APP = "monoblock"  # the application's name
KEY = "MONOBLOCK_API_KEY"
AHEAD = 2  # requests of a replica for each sequence that it computes at once
STARTS = 3  # attempts to start a replica until the deployment fails
HEALTH, HEALTHY = 10, 30  # seconds between two checks of a replica, and that a check may take


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """How many replicas there are, and what each gets: `cpus` and `gpus` of Ray's, and threads. With `most`, Ray Serve
    has between `count` and `most`, by the number of requests."""

    count: int = 1
    most: int | None = None
    threads: int = 1
    cpus: float = 1
    gpus: float = 0


def application(settings: ServerSettings, sources: Sources, options: ReplicaOptions) -> Any:
    """The application for `serve.run`. `sources`: the arguments of `entries_of` before the download options."""
    capacity = AHEAD * settings.engine.max_sequences
    scale: dict[str, Any] = {"num_replicas": options.count}
    if options.most is not None:
        scale = {
            "autoscaling_config": {
                "min_replicas": options.count,
                "max_replicas": options.most,
                "target_ongoing_requests": max(1, settings.engine.max_sequences // 2),
            }
        }
    replica = serve.deployment(Replica).options(
        **scale,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        max_ongoing_requests=capacity,
        max_queued_requests=settings.engine.max_waiting,
        max_constructor_retry_count=STARTS,
        health_check_period_s=HEALTH,
        health_check_timeout_s=HEALTHY,
        graceful_shutdown_timeout_s=settings.drain_timeout,
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter,
            request_router_kwargs={"bound": max(1, settings.engine.max_sequences // 2)},
        ),
    )
    # All requests pass the front: it must not be what limits them.
    front = serve.deployment(serve.ingress()(Entrance)).options(
        name="Front", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=settings.limits.in_flight
    )
    bound = replica.bind(settings, sources, options.threads, str(Path.cwd()))
    return front.bind(bound, settings.limits.body)


class Replica:
    """The models, and the server's application on them."""

    async def __init__(self, settings: ServerSettings, sources: Sources, threads: int, folder: str) -> None:
        prepare(threads, folder)
        from monoblock.serving.server.app import ServerApp

        entries: list[ModelEntry] = await asyncio.to_thread(entries_of, *sources, settings.hub)
        self._app = ServerApp(entries, settings)
        registry = self._app.state.registry
        wanted = [entry for entry in entries if not entry.extra]
        for entry in wanted if len(wanted) == 1 or settings.preload else []:
            await registry.load(entry)
        self._watch = asyncio.create_task(registry.watch())

    def check_health(self) -> None:
        """RuntimeError if the replica can answer no more, so that Ray Serve replaces it."""
        if self._app.failed is not None:
            raise RuntimeError(str(self._app.failed))

    async def answer(self, head: dict[str, Any], body: bytes) -> AsyncGenerator[list[Any]]:
        """The answer to a request, as lists of ASGI messages."""
        queue: asyncio.Queue[Any] = asyncio.Queue()
        given, gone = False, asyncio.Event()

        async def receive() -> dict[str, Any]:
            nonlocal given
            if given:
                await gone.wait()
                return {"type": "http.disconnect"}
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def run() -> None:
            try:
                scope = {"type": "http", "asgi": {"version": "3.0"}, "root_path": "", "state": {}, **head}
                await self._app(scope, receive, queue.put)
            finally:
                queue.put_nowait(None)

        task = asyncio.create_task(run())
        try:
            ended = False
            while not ended:
                found = [await queue.get()]
                while not queue.empty():
                    found.append(queue.get_nowait())
                ended = found[-1] is None
                if messages := [message for message in found if message is not None]:
                    yield messages
            await task
        finally:  # the client may have left
            gone.set()
            if not task.done():
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task


class Entrance:
    """The front, as a deployment."""

    def __init__(self, replicas: Any, body: int) -> None:
        streamed = replicas.options(stream=True)
        self._front = Front(Replicas(streamed.answer.remote, DEAD, (BackPressureError,)), body)

    def __serve_build_asgi_app__(self) -> Front:
        return self._front


# ---------------------------------------------------------------------------- serve run


@dataclass(frozen=True, kw_only=True)
class ServeArguments:
    """The arguments of `build_app`. `models`, `names`: several are separated by commas; `cache_memory` in MB. The key
    of the API is the environment variable MONOBLOCK_API_KEY."""

    models: str = ""
    names: str = ""
    replicas: int = 1
    max_replicas: int | None = None
    threads: int | None = None
    gpus: float = 0
    dtype: str = "auto"
    quantize: str | None = None
    cache_memory: int | None = None
    max_model_len: int | None = None
    max_sequences: int = 64
    max_waiting: int = 1024
    drain_timeout: float = 30.0


def build_app(args: Mapping[str, Any]) -> Any:
    """The application for `serve run`, `serve deploy` and RayService. ValueError for an unknown argument."""
    known = {field.name: str(field.type) for field in fields(ServeArguments)}
    if unknown := [name for name in args if name not in known]:
        raise ValueError(f"build_app takes no argument {unknown[0]!r}; it takes: {', '.join(known)}")
    given = ServeArguments(**{name: _typed(name, value, known[name]) for name, value in args.items()})
    threads = given.threads or available_threads()
    settings = ServerSettings(
        host="0.0.0.0",
        api_key=os.environ.get(KEY) or None,
        drain_timeout=given.drain_timeout,
        limits=Limits(waiting=given.max_waiting),
        engine=EngineOptions(
            cache_memory=None if given.cache_memory is None else given.cache_memory * 10**6,
            max_model_len=given.max_model_len,
            max_sequences=given.max_sequences,
            max_waiting=given.max_waiting,
        ),
        loading={
            "dtype": given.dtype,
            "device": "cuda" if given.gpus else "cpu",
            "quantize": given.quantize,
        },
    )
    models: list[str | None] = [*given.models.split(",")] if given.models else [None]
    sources: Sources = (models, _names(given.names), [])
    options = ReplicaOptions(
        count=given.replicas, most=given.max_replicas, threads=threads, cpus=threads, gpus=given.gpus
    )
    return application(settings, sources, options)


def _names(text: str) -> list[str]:
    return text.split(",") if text else []


def _typed(name: str, value: Any, kind: str) -> Any:
    """An argument, which the command line gives as text."""
    if value is None and "None" in kind:
        return None
    kinds = {"int": int, "float": float, "str": str}
    try:
        return kinds[kind.partition(" ")[0]](value)
    except (TypeError, ValueError):
        raise ValueError(f"build_app: {name}={value!r} is not {kind.partition(' ')[0]}") from None
