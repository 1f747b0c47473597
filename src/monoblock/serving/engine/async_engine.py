"""The engine in a thread of its own, for an asyncio program."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from monoblock.serving.engine.engine import Engine, EngineStats
from monoblock.serving.engine.params import SamplingParams
from monoblock.serving.engine.results import Completion, Delta, QueueFull, TokenLogprob, Usage, best
from monoblock.serving.engine.sequence import EngineRequest

log = logging.getLogger("monoblock")


class EngineClosed(RuntimeError):
    """The engine takes no more requests, or can compute no more."""


class Generation:
    """The results of a request: an asynchronous iterator of deltas."""

    def __init__(
        self, engine: AsyncEngine, prompt: Sequence[int] | str, params: SamplingParams, image: Any
    ) -> None:
        self.params = params
        self.prompt: list[int] = [] if isinstance(prompt, str) else list(prompt)
        self.usage = Usage(prompt=len(self.prompt))
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self._engine, self._given, self._image = engine, prompt, image
        self._queue: asyncio.Queue[Delta | BaseException] = asyncio.Queue()
        self._left = params.sequences
        self.request: EngineRequest | None = None  # the engine's, of the computing thread
        self.cancelled = False

    def cancel(self) -> None:
        """End the request; its sequences finish as "cancelled"."""
        self.cancelled = True
        self._engine.call(lambda: self._engine.cancel(self))

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Delta:
        if not self._left:
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, BaseException):
            self._left = 0
            raise item
        if item.finish is not None:
            self._left -= 1
        return item

    async def completions(self) -> list[Completion]:
        """All sequences, complete; of `best_of`, the `n` with the largest mean log-probability."""
        found = [Completion(index) for index in range(self.params.sequences)]
        async for delta in self:
            found[delta.index].add(delta)
        return best(found, self.params.n)

    def put(self, item: Delta | BaseException) -> None:
        """A result of a step; called in the event loop."""
        if self.request is not None:
            self.prompt, self.usage = self.request.prompt, self.request.usage
            self.prompt_logprobs = self.request.prompt_logprobs
        self._queue.put_nowait(item)


class AsyncEngine:
    """One thread computes; results come on the event loop in which `start` was called."""

    def __init__(self, core: Engine) -> None:
        self.core, self.name, self.tokenizer, self.processor = core, core.name, core.tokenizer, core.processor
        self.max_model_len = core.max_model_len
        self._inbox: deque[Callable[[], Any]] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False
        self._active: dict[EngineRequest, Generation] = {}
        self._outbox: list[tuple[Generation, Delta | BaseException]] = []
        self._pending = 0  # sequences that were submitted and not yet taken by the thread
        self._told = False
        self.on_failure: Callable[[BaseException], None] | None = None

    def start(self, on_failure: Callable[[BaseException], None] | None = None) -> None:
        """Start the thread; called in a coroutine. `on_failure` is called in the event loop when the engine can compute
        no more (`BatchRunner.failure`); all requests end with that error."""
        self._loop = asyncio.get_running_loop()
        self.on_failure = on_failure
        self.core.runner.watch(lambda: self.call(_nothing))
        self._thread = threading.Thread(target=self._run, name=f"engine {self.name}", daemon=True)
        self._thread.start()

    def submit(self, prompt: Sequence[int] | str, params: SamplingParams, *, image: Any = None) -> Generation:
        """A new request; `prompt`: token ids, or with an image the text.

        ValueError: see `Engine.add`; QueueFull: too many wait. Errors that show only in the computing thread, as of an
        image, are raised by the iterator.
        """
        if self._closing or self.core.runner.failure is not None:
            raise EngineClosed("the engine is closing")
        waiting = len(self.core.scheduler.waiting) + self._pending
        if waiting + params.sequences > self.core.options.max_waiting:
            raise QueueFull(f"{waiting} sequences wait already: try again later")
        if image is None:
            self.core.check(prompt, params)
        generation = Generation(self, prompt, params, image)
        with self._wake:  # the computing thread counts down
            self._pending += params.sequences
        self.call(lambda: self._begin(generation, prompt, image))
        return generation

    def _begin(self, generation: Generation, prompt: Sequence[int] | str, image: Any) -> None:
        with self._wake:
            self._pending -= generation.params.sequences
        if generation.cancelled:
            for index in range(generation.params.sequences):
                self._outbox.append((generation, Delta(index, "", (), (), "cancelled")))
            return
        try:
            request = self.core.add(
                prompt,
                generation.params,
                image=image,
                sink=lambda delta: self._outbox.append((generation, delta)),
            )
        except Exception as error:
            failure = self.core.runner.failure
            self._outbox.append((generation, error if failure is None else EngineClosed(str(failure))))
            return
        generation.request = request
        self._active[request] = generation

    def cancel(self, generation: Generation) -> None:
        """End a request; in the computing thread."""
        if generation.request is not None and generation.request in self._active:
            self.core.cancel(generation.request)

    def call(self, function: Callable[[], Any]) -> None:
        """Call a function in the computing thread, between steps."""
        with self._wake:
            self._inbox.append(function)
            self._wake.notify()

    async def run(self, function: Callable[[], Any]) -> Any:
        """The result of a function that is called in the computing thread, between steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(value: Any, error: BaseException | None) -> None:
            if not future.done():
                future.set_exception(error) if error is not None else future.set_result(value)

        def work() -> None:
            try:
                value, error = function(), None
            except Exception as caught:
                value, error = None, caught
            loop.call_soon_threadsafe(settle, value, error)

        self.call(work)
        return await future

    def stats(self) -> EngineStats:
        """The state and the totals."""
        return self.core.stats()

    async def close(self, *, drain: bool = True) -> None:
        """Take no more requests, finish those that run (`drain`) or cancel them, and end the thread."""
        if not drain:
            self.call(lambda: [self.core.cancel(request) for request in list(self._active)])
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self.core.close)

    # ------------------------------------------------------------------ the computing thread

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._inbox and not self.core.busy and not self._closing:
                    self._wake.wait()
                work, self._inbox = list(self._inbox), deque()
                if self._closing and not work and not self.core.busy:
                    return
            for function in work:
                function()
            try:
                if self.core.runner.failure is None:
                    self.core.step()
            except Exception as error:  # of the whole step: all requests end
                if self.core.runner.failure is None:
                    log.exception("a step of the engine failed")
                    self._fail_all(error)
            if (failure := self.core.runner.failure) is not None:
                self._tell(failure)
                self._fail_all(EngineClosed(str(failure)))
            self._send()

    def _fail_all(self, error: BaseException) -> None:
        for request in list(self._active):
            self.core.fail(request, error)

    def _tell(self, failure: BaseException) -> None:
        """Call `on_failure`, once, before the requests end."""
        if self._told or self.on_failure is None or self._loop is None or self._loop.is_closed():
            return
        self._told = True
        self._loop.call_soon_threadsafe(self.on_failure, failure)

    def _send(self) -> None:
        """Hand the results of a step to the event loop."""
        for request, generation in list(self._active.items()):
            if request.error is not None:
                self._outbox.append((generation, request.error))
            if request.done:
                del self._active[request]
        items, self._outbox = self._outbox, []
        if items and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, items)


def _deliver(items: list[tuple[Generation, Delta | BaseException]]) -> None:
    for generation, item in items:
        generation.put(item)


def _nothing() -> None:
    """Wakes the computing thread."""
