"""Slow work outside the event loop, and work that ends when the client is gone."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request

from monoblock.serving.server.errors import ClientGone

Result = TypeVar("Result")

# Tokenisation, templates of models, and images.
_WORKERS = ThreadPoolExecutor(4, thread_name_prefix="monoblock-server")
# Templates and schemas of requests, which may take seconds: others do not wait for them.
_SLOW = ThreadPoolExecutor(2, thread_name_prefix="monoblock-slow")


async def in_thread(function: Callable[..., Result], *args: Any, slow: bool = False) -> Result:
    """The function's result, computed in a thread. `slow`: it may take seconds.

    A panic of a Rust library, which is no Exception, is raised as a RuntimeError.
    """

    def call() -> Result:
        try:
            return function(*args)
        except BaseException as error:
            if isinstance(error, Exception):
                raise
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    return await asyncio.get_running_loop().run_in_executor(_SLOW if slow else _WORKERS, call)


async def in_own_thread(function: Callable[[], Result], name: str) -> Result:
    """The function's result, computed in a thread of its own, for which the end of the process does not wait."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Result] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if not result.done():
            result.set_result(value) if error is None else result.set_exception(error)

    def work() -> None:
        value, error = None, None
        try:
            value = function()
        except BaseException as caught:
            error = (
                caught
                if isinstance(caught, Exception)
                else RuntimeError(f"{type(caught).__name__}: {caught}")
            )
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return await result


async def until_gone(request: Request) -> None:
    """Returns when the client has closed its connection. The request's body must have been read."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine; it is cancelled, and ClientGone raised, if the client closes its connection."""
    running = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(until_gone(request))
    try:
        await asyncio.wait((running, watch), return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            raise ClientGone
        return running.result()
    finally:
        await cancelled(running, watch)


async def cancelled(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait for their end."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


async def first_of(work: Awaitable[Result], seconds: float) -> Result:
    """The result, or TimeoutError after so many seconds; a thread's work goes on without being waited for."""
    return await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(work)), seconds)
