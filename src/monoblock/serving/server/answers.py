"""Answers of handlers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from monoblock.serving.server.errors import ApiError, timed_out
from monoblock.serving.server.generating import AnswerRun
from monoblock.serving.server.kinds import ModelKind
from monoblock.serving.server.models import TextModel
from monoblock.serving.server.service import ServerState
from monoblock.serving.server.streaming import EventStream, dumped
from monoblock.serving.server.threads import while_connected


def json_answer(content: Any, status: int = 200) -> Response:
    """A JSON body."""
    return Response(dumped(content).encode(), status, media_type="application/json")


async def timed_answer(request: Request, state: ServerState, work: Coroutine[Any, Any, Any]) -> Response:
    """The JSON answer that a coroutine computes. It is cancelled when the client leaves, or when the time of a request
    is up (ApiError 408)."""
    seconds = state.settings.limits.request_seconds
    try:
        async with asyncio.timeout(seconds):
            return json_answer(await while_connected(request, work))
    except TimeoutError:
        raise timed_out(seconds) from None


def error_answer(error: ApiError) -> Response:
    """OpenAI's error object."""
    answer = json_answer(error.content(), error.status)
    answer.headers.update(error.headers)
    return answer


async def stream_while_used(
    state: ServerState,
    request: Request,
    model: str | None,
    prepare: Callable[[TextModel], Awaitable[tuple[AsyncGenerator[bytes], AnswerRun]]],
    done: bool = True,
) -> Response:
    """The stream of the events that `prepare` returns for the model, which stays loaded until the stream ends; then the
    run is closed.

    Errors of `prepare` come before the answer begins, and so have their own status.
    """
    stack = AsyncExitStack()

    async def start() -> tuple[AsyncGenerator[bytes], AnswerRun]:
        loaded = await stack.enter_async_context(state.registry.use(model, ModelKind.GENERATE))
        return await prepare(loaded)

    try:
        events, run = await while_connected(request, start())
    except BaseException:
        await stack.aclose()
        raise

    async def close() -> None:
        async with stack:
            await events.aclose()
            run.close()

    return EventStream(events, close, done)
