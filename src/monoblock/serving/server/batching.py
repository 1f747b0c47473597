"""Joins the waiting requests of an embedding or classification model into batches."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from monoblock.serving.server.errors import too_busy

TOKENS = 16384  # of the requests that are computed together; one request may have more


@dataclass
class BatchJob:
    """A request's rows, and the future of their results. `key`: only jobs with the same one are computed together."""

    rows: Sequence[Any]
    size: int
    key: Any
    result: asyncio.Future[Any]


class Batcher:
    """One thread that computes `run(rows, key)`, an array or list with a result per row, for all waiting jobs at once.

    A job's results do not depend on the others. If a batch raises an error, each of its jobs is computed alone.
    """

    def __init__(self, run: Callable[[list[Any], Any], Any], most_waiting: int) -> None:
        self._run, self._most = run, most_waiting
        self._waiting: deque[BatchJob] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="monoblock-batches")
        self._task: asyncio.Task[None] | None = None
        self.running = 0

    @property
    def waiting(self) -> int:
        """The number of jobs that wait."""
        return len(self._waiting)

    async def submit(self, rows: Sequence[Any], size: int, key: Any = None) -> Any:
        """The results of these rows. `size`: their tokens. ApiError 429 if too many jobs wait."""
        if len(self._waiting) >= self._most:
            raise too_busy(f"{self._most} requests are waiting for this model")
        job = BatchJob(rows, size, key, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        return await job.result

    async def _work(self) -> None:
        while jobs := self._next():
            self.running = len(jobs)
            try:
                await self._compute(jobs)
            finally:
                self.running = 0

    def _next(self) -> list[BatchJob]:
        """The jobs of the next batch, without those that nobody waits for."""
        jobs: list[BatchJob] = []
        size = 0
        while self._waiting:
            job = self._waiting[0]
            if jobs and (job.key != jobs[0].key or size + job.size > TOKENS):
                break
            self._waiting.popleft()
            if not job.result.done():
                jobs.append(job)
                size += job.size
        return jobs

    async def _compute(self, jobs: list[BatchJob]) -> None:
        rows = [row for job in jobs for row in job.rows]
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._thread, self._run, rows, jobs[0].key)
        except Exception as error:
            if len(jobs) == 1:
                if not jobs[0].result.done():
                    jobs[0].result.set_exception(error)
                return
            for job in jobs:
                await self._compute([job])
            return
        start = 0
        for job in jobs:
            if not job.result.done():
                job.result.set_result(results[start : start + len(job.rows)])
            start += len(job.rows)

    async def close(self) -> None:
        """End the thread after its batch; jobs that wait are cancelled."""
        for job in self._waiting:
            job.result.cancel()
        self._waiting.clear()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown(wait=False)
