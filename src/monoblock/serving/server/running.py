"""Runs a server: one process, one event loop. SIGTERM and SIGINT drain it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from monoblock.serving.server.app import ServerApp
from monoblock.serving.server.threads import cancelled

log = logging.getLogger("monoblock")

KEEP_ALIVE = 75  # seconds that an idle connection stays open: longer than clients' pools keep theirs
CLOSING = 5  # seconds for the last answers to be sent after the deadline of draining


class DrainingServer(uvicorn.Server):
    """A server that ends when its requests are finished.

    The first signal stops new requests (503), the second one stops the running ones too.
    """

    def __init__(self, app: ServerApp, listening: Callable[[str], None]) -> None:
        settings = app.state.settings
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=CLOSING,
                lifespan="on",
                ws="none",
            )
        )
        self.app, self.interrupted = app, False
        app.on_failure = self._failed
        self._listening = listening
        self._background: set[asyncio.Task[Any]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._listening(self.address())
            self._start(self._preload())

    def address(self) -> str:
        """The URL of the server; the port is the one that the system chose for 0."""
        host, port = self.app.state.settings.host, self.app.state.settings.port
        for server in self.servers:
            for found in server.sockets:
                port = found.getsockname()[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _preload(self) -> None:
        """Load the only model, or with `preload` all; extra ones later. An error of the only model ends the server."""
        registry = self.app.state.registry
        entries = [entry for entry in registry.entries.values() if not entry.extra]
        if len(entries) > 1 and not self.app.state.settings.preload:
            return
        for entry in entries:
            try:
                await registry.load(entry)
            except Exception as error:
                self.app.failed = error.__cause__ or error
                self.should_exit = True
                return

    def _failed(self) -> None:
        """The model can compute no more: its requests end with errors, then the server ends with one."""
        self._start(self._drain())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        del frame
        if sig == signal.SIGINT:
            self.interrupted = True
        state = self.app.state
        if state.draining:
            self.force_exit = self.should_exit = True
            return
        state.draining = True
        asyncio.get_running_loop().call_soon_threadsafe(self._start, self._drain())

    async def _drain(self) -> None:
        """Wait for the running requests, and stop those that last too long."""
        state = self.app.state
        timeout = state.settings.drain_timeout
        state.idle.clear()
        if not state.drained():
            log.info("the server finishes %d requests", state.running)
            try:
                async with asyncio.timeout(timeout):
                    await state.idle.wait()
            except TimeoutError:
                log.warning("%d requests are stopped after %g s", state.running, timeout)
                await self._interrupt()
        self.should_exit = True

    async def _interrupt(self) -> None:
        """End the running requests: generations with an error that their clients receive, then what is left."""
        state = self.app.state
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSING):
                await state.registry.close(drain=False)
                if not state.drained():
                    await state.idle.wait()
        await cancelled(*self.app.guard.tasks)


def serve(app: ServerApp, listening: Callable[[str], None]) -> bool:
    """Run the server until a signal ends it; `listening` gets its URL. Returns whether Ctrl-C ended it.

    OSError if the address cannot be used; the error of the only model if it cannot be loaded; RuntimeError if a process
    of a sharded model fails.
    """
    settings = app.state.settings
    # uvicorn would log the error of a port in use and exit.
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((settings.host, settings.port))
        except OSError as error:
            raise OSError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from None
        server = DrainingServer(app, listening)
        server.run(sockets=[bound])
    if app.failed is not None:
        raise app.failed
    return server.interrupted
