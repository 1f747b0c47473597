"""What every request passes first: host, origin, key, draining; and how it is counted and how its errors are sent."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from monoblock.serving.server.answers import error_answer
from monoblock.serving.server.errors import ApiError, ClientGone, too_busy
from monoblock.serving.server.service import ServerState

log = logging.getLogger("monoblock")

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1", "[::1]"})
# Without an API key: what a probe or a browser asks for before anybody has entered the key.
OPEN = frozenset({"/health", "/", "/favicon.ico"})
OPEN_BELOW = ("/page/",)
APART = frozenset({"/health", "/metrics"})  # answered while draining, and not counted


class RequestGuard:
    """The outermost ASGI application."""

    def __init__(self, app: ASGIApp, state: ServerState, paths: frozenset[str]) -> None:
        self.app, self.state, self.paths = app, state, paths
        key = state.settings.api_key
        self._key = None if key is None else key.encode()
        self._hosts = LOOPBACK | {name.lower() for name in state.settings.hosts}
        self.tasks: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        apart = path in APART or scope["method"] == "OPTIONS"
        started = time.perf_counter()
        status = 0
        begun = False

        async def watched(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                begun, status = True, message["status"]
                if self.state.draining:
                    message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            await send(message)

        task = asyncio.current_task()
        if not apart:
            self.state.running += 1
            self.state.metrics.in_flight.inc()
            if task is not None:
                self.tasks.add(task)
        try:
            self._admit(scope, apart)
            if not apart and self.state.running > self.state.settings.limits.in_flight:
                raise too_busy(f"{self.state.running - 1} requests run")
            await self.app(scope, receive, watched)
        except asyncio.CancelledError:
            if not self.state.draining:
                raise
            if not begun:
                await error_answer(_stopping())(scope, receive, watched)
        except ClientGone:
            status = 499  # nginx's number for it; nobody receives an answer
        except Exception as error:
            if not isinstance(error, ApiError):
                log.error("a request failed", exc_info=error)
            if not begun:
                await error_answer(as_api_error(error))(scope, receive, watched)
        finally:
            if not apart:
                self.state.running -= 1
                self.state.metrics.in_flight.dec()
                if task is not None:
                    self.tasks.discard(task)
                if self.state.drained():
                    self.state.idle.set()
            self._count(scope, path, status, time.perf_counter() - started)

    def _count(self, scope: Scope, path: str, status: int, seconds: float) -> None:
        endpoint = path if path in self.paths else "other"
        metrics = self.state.metrics
        if status == 499 or scope.get("state", {}).get("client_gone"):
            metrics.cancelled.labels(endpoint).inc()
        metrics.requests.labels(endpoint, str(status)).inc()
        metrics.duration.labels(endpoint).observe(seconds)

    def _admit(self, scope: Scope, apart: bool) -> None:
        """ApiError for a request that is not admitted."""
        headers = Headers(scope=scope)
        if self.state.settings.loopback:
            self._check_host(headers)
        path = scope["path"]
        closed = path not in OPEN and not path.startswith(OPEN_BELOW) and scope["method"] != "OPTIONS"
        if self._key is not None and closed:
            self._check_key(headers)
        if self.state.draining and not apart:
            raise _stopping()

    def _check_host(self, headers: Mapping[str, str]) -> None:
        """A web page cannot reach a loopback address under a name of its own."""
        host = headers.get("host", "").lower()
        name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
        if name not in self._hosts:
            raise ApiError(
                f"the host {name[:100]!r} is not this server's: use localhost, or start it with --allowed-host",
                status=403,
                code="invalid_host",
            )

    def _check_key(self, headers: Mapping[str, str]) -> None:
        assert self._key is not None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._key)
        if scheme.lower() != "bearer" or not same:
            raise ApiError(
                "the API key is missing or wrong: send the header Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _stopping() -> ApiError:
    return ApiError(
        "the server is stopping: send the request to another one, or try again later",
        status=503,
        code="server_stopping",
        headers={"Retry-After": "5", "Connection": "close"},
    )


def as_api_error(error: Exception) -> ApiError:
    """The error itself; of another one 500, without its words."""
    if isinstance(error, ApiError):
        return error
    return ApiError(
        f"the server failed ({type(error).__name__}); its log has the reason",
        status=500,
        code="internal_error",
    )
