"""Server-sent events, and the end of a stream when its client leaves."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from monoblock.serving.server.errors import ApiError
from monoblock.serving.server.threads import cancelled

log = logging.getLogger("monoblock")

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # for nginx
}
DONE = b"data: [DONE]\n\n"


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def dumped(value: Any) -> str:
    """Compact JSON."""
    return _encode(value)


def event(value: Any, name: str | None = None) -> bytes:
    """An event with JSON data."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {dumped(value)}\n\n".encode()


class EventStream(Response):
    """Sends the events of a generator, then `data: [DONE]` with `done`. At the end, or when the client leaves, `close`
    is called, which also stops a generator that has not begun.

    An error after the beginning of the answer is sent as an event with OpenAI's error object.
    """

    def __init__(
        self, events: AsyncGenerator[bytes], close: Callable[[], Awaitable[None]], done: bool = True
    ) -> None:
        super().__init__(headers=HEADERS)
        self._events, self._close, self._done = events, close, done
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        watch = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((sending, watch), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            else:
                scope.setdefault("state", {})["client_gone"] = True
        finally:
            await cancelled(sending, watch)
            await self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": event(error.content()), "more_body": True})
        except Exception as error:
            log.exception("a stream failed")
            failure = ApiError(f"the model failed: {type(error).__name__}", status=500, code="engine_error")
            await send({"type": "http.response.body", "body": event(failure.content()), "more_body": True})
        await send({"type": "http.response.body", "body": DONE if self._done else b"", "more_body": False})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
