"""`monoblock batch`: the requests of a file, answered by the server's own handlers, without a network."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from monoblock.serving.batch_files import BatchLine, BatchResults, read_lines, record
from monoblock.serving.server.app import ServerApp
from monoblock.serving.server.errors import ApiError
from monoblock.serving.server.registry import ModelEntry
from monoblock.serving.server.settings import ServerSettings

log = logging.getLogger("monoblock")

AHEAD = 2  # requests in progress for each sequence of the batch, so that it stays full


@dataclass(frozen=True)
class Answering:
    """`answer`: a request -> its result, a line of the output; it is called for `most` requests at a time."""

    answer: Callable[[BatchLine], Awaitable[dict[str, Any]]]
    most: int


@dataclass(frozen=True)
class BatchCounts:
    """Requests of a batch: all, those that were answered before this run, and those that failed."""

    total: int
    resumed: int
    failed: int


async def run_batch(
    source: Path,
    results: BatchResults,
    options: str,
    progress: Callable[[int, int], None],
    answering: Callable[[], AbstractAsyncContextManager[Answering]],
) -> BatchCounts:
    """Answer the requests of `source` that have no result yet.

    `options`: everything that a result depends on beside its request; `progress` gets the number of requests with a
    result and the number of all; `answering` loads the models, and is called if there is anything to do.

    ValueError: a line is no request, or a result is of another request or other options. Errors of requests are
    results.
    """
    total = _checked(source, results, options)
    resumed = len(results.done)
    if resumed < total:
        async with answering() as found:
            await _answer(found, source, results, options, lambda done: progress(done, total))
    return BatchCounts(total, resumed, results.failed)


@asynccontextmanager
async def answers(entries: list[ModelEntry], settings: ServerSettings) -> AsyncGenerator[Answering]:
    """Load the models in this process; they answer requests by the server's handlers."""
    app = ServerApp(entries, settings)
    async with _loaded(app):
        yield Answering(lambda line: _result(app, line), most_requests(settings))


def most_requests(settings: ServerSettings) -> int:
    """The number of requests that an engine gets at a time."""
    return AHEAD * settings.engine.max_sequences


def _checked(source: Path, results: BatchResults, options: str) -> int:
    """The number of requests; ValueError for wrong ones, before any is answered."""
    total = known = 0
    for line in read_lines(source, options):
        total += 1
        if (found := results.done.get(line.custom_id)) is None:
            continue
        known += 1
        if found != line.id:
            raise ValueError(
                f"{results.path} has a result of {line.custom_id!r} for another request, model or options: give the "
                "same ones, or begin again with --restart"
            )
    if known < len(results.done):
        raise ValueError(
            f"{results.path} has {len(results.done) - known:,} results of requests that {source} does not have: give "
            "the same input, or begin again with --restart"
        )
    if not total:
        raise ValueError(f"{source} has no requests")
    return total


@asynccontextmanager
async def _loaded(app: ServerApp) -> AsyncGenerator[None]:
    """The app with all of its models loaded; the error of one that cannot be."""
    registry = app.state.registry
    try:
        for entry in registry.entries.values():
            try:
                await registry.load(entry)
            except ApiError as error:
                raise (error.__cause__ or error) from None
        yield
    finally:
        await registry.close(drain=False)


async def _answer(
    answering: Answering,
    source: Path,
    results: BatchResults,
    options: str,
    progress: Callable[[int], None],
) -> None:
    """Answer what is left. Results are written in the order in which they are finished."""
    running: set[asyncio.Future[dict[str, Any]]] = set()
    lines = (line for line in read_lines(source, options) if line.custom_id not in results.done)
    progress(len(results.done))
    try:
        more = True
        while more or running:
            while more and len(running) < answering.most:
                if (line := next(lines, None)) is None:
                    more = False
                else:
                    running.add(asyncio.ensure_future(answering.answer(line)))
            if running:
                finished, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                # The engine computes on while the disk writes.
                await asyncio.to_thread(results.append, [task.result() for task in finished])
                progress(len(results.done))
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _result(app: ServerApp, line: BatchLine) -> dict[str, Any]:
    if line.body.get("stream"):
        refused = ApiError(
            "stream is not supported in a batch: its results are whole",
            param="stream",
            code="unsupported_parameter",
        )
        return record(line, refused.status, _request_id(), refused.content())
    status, body = await post(app, line.url, line.body)
    if app.failed is not None:  # not an error of the request: it is answered by the next run
        raise app.failed
    return record(line, status, _request_id(), body)


def _request_id() -> str:
    return f"req_{uuid4().hex}"


async def post(app: ServerApp, path: str, body: Any) -> tuple[int, Any]:
    """Status and JSON answer of a request to an ASGI application."""
    content = json.dumps(body).encode()
    headers = [
        (b"host", b"localhost"),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
    ]
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": None,
        "server": ("localhost", 0),
        "state": {},
    }
    given = False
    never: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # the client does not leave
    status, chunks = 0, list[bytes]()

    async def receive() -> dict[str, Any]:
        nonlocal given
        if given:
            await never
        given = True
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            chunks.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, json.loads(b"".join(chunks))
