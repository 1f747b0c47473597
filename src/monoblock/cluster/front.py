"""The front of replicas: an ASGI application that hands each request to one of them, to another one if that dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.types import Message, Receive, Scope, Send

from monoblock.serving.server.answers import error_answer
from monoblock.serving.server.errors import ApiError
from monoblock.serving.server.streaming import event

log = logging.getLogger("monoblock")

ATTEMPTS = 4  # replicas that a request is given to, one after the other
PAUSE = 0.25  # seconds before another attempt
RETRY_AFTER = "5"  # seconds
HEAD = ("http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server")


class Answers(Protocol):
    """A replica's answer, as lists of ASGI messages."""

    def __aiter__(self) -> AsyncIterator[list[Message]]: ...

    def cancel(self) -> Any:
        """The client has left."""
        ...


@dataclass(frozen=True)
class Replicas:
    """`call`: a request's head (`HEAD`) and body -> the answer of one of the replicas. `dead`: exceptions after which
    another one is tried; `busy`: those of a full queue."""

    call: Callable[[dict[str, Any], bytes], Answers]
    dead: tuple[type[BaseException], ...]
    busy: tuple[type[BaseException], ...] = ()


class Front:
    """The application. `body`: bytes of a request at most.

    A request whose replica dies before the first byte of its answer is sent is given to another one; afterwards a
    stream ends with an error, and so does another answer, by a connection that is closed too early. Without a replica
    that answers, the status is 503 with Retry-After.
    """

    def __init__(self, replicas: Replicas, body: int) -> None:
        self.replicas, self.body = replicas, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        try:
            content = await self._read(receive)
            if content is not None:
                await self._answer(scope, content, receive, send)
        except ApiError as error:
            await error_answer(error)(scope, receive, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None if the client has left. ApiError 413."""
        parts, size, more = list[bytes](), 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            parts.append(part)
            size += len(part)
            if size > self.body:
                raise ApiError(
                    f"the body is longer than {self.body:,} bytes", status=413, code="request_too_large"
                )
            more = message.get("more_body", False)
        return b"".join(parts)

    async def _answer(self, scope: Scope, content: bytes, receive: Receive, send: Send) -> None:
        head = {name: scope[name] for name in HEAD if name in scope}
        gone = asyncio.ensure_future(_gone(receive))
        try:
            for attempt in range(ATTEMPTS):
                if attempt:
                    await asyncio.sleep(PAUSE)
                sent = _Sent(send)
                try:
                    await self._forward(head, content, gone, sent)
                except self.replicas.busy:
                    raise _unavailable("all replicas are busy", "server_busy") from None
                except self.replicas.dead as error:
                    log.warning("a replica died: %s", " ".join(str(error).split())[:200])
                    if sent.begun:
                        await sent.broken()
                        return
                else:
                    return
            raise _unavailable("no replica answers", "replica_lost")
        finally:
            gone.cancel()

    async def _forward(
        self, head: dict[str, Any], content: bytes, gone: asyncio.Future[None], sent: _Sent
    ) -> None:
        """Send the answer of a replica as it comes, until it ends or the client has left."""
        answers = self.replicas.call(head, content)
        source = aiter(answers)
        while True:
            following = asyncio.ensure_future(anext(source, None))
            await asyncio.wait((following, gone), return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                answers.cancel()
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
                return
            if (messages := following.result()) is None:
                return
            await sent.put(messages)


class _Sent:
    """What the client has received. The head is held back until the first of the body."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._held: Message | None = None
        self._stream = False
        self.begun = False

    async def put(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if message["type"] == "http.response.start":
                self._held = message
                kind = dict(message.get("headers", ())).get(b"content-type", b"")
                self._stream = kind.startswith(b"text/event-stream")
                continue
            if self._held is not None:
                held, self._held, self.begun = self._held, None, True
                await self._send(held)
            await self._send(message)

    async def broken(self) -> None:
        """End an answer whose replica has died."""
        if not self._stream:
            raise ConnectionError("the replica died while it answered")  # the connection is closed
        await self._send({"type": "http.response.body", "body": event(_lost().content()), "more_body": False})


async def _gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _lost() -> ApiError:
    return _unavailable("the replica died while it answered: send the request again", "replica_lost")


def _unavailable(text: str, code: str) -> ApiError:
    return ApiError(text, status=503, code=code, headers={"Retry-After": RETRY_AFTER})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"].removeprefix("lifespan.")
        await send({"type": f"lifespan.{kind}.complete"})
        if kind == "shutdown":
            return
