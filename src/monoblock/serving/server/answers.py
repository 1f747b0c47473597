"""Answers of handlers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from monoblock.serving.server.errors import ApiError
from monoblock.serving.server.generating import AnswerRun
from monoblock.serving.server.kinds import ModelKind
from monoblock.serving.server.models import TextModel
from monoblock.serving.server.service import ServerState
from monoblock.serving.server.streaming import EventStream, dumped
from monoblock.serving.server.threads import while_connected


def json_answer(content: Any, status: int = 200) -> Response:
    """A JSON body."""
    return Response(dumped(content).encode(), status, media_type="application/json")


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
