"""Runs generations for a request: submits them, times them, and cancels them when the client leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from monoblock.serving.engine.async_engine import EngineClosed
from monoblock.serving.engine.params import SamplingParams
from monoblock.serving.engine.results import Completion, Delta, QueueFull
from monoblock.serving.server.errors import ApiError, timed_out, too_busy
from monoblock.serving.server.metrics import ServerMetrics
from monoblock.serving.server.models import TextModel
from monoblock.serving.server.prompts import PreparedPrompt
from monoblock.serving.server.sampling import refused_value


@dataclass
class AnswerRun:
    """The generations of one request, one per prompt, and their times."""

    model: TextModel
    name: str
    metrics: ServerMetrics
    seconds: float
    generations: list[Any] = field(default_factory=list[Any])
    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    _counted: bool = False
    _expired: bool = False
    _ahead: Delta | None = None
    _timer: asyncio.TimerHandle | None = None

    def submit(self, prompts: Sequence[PreparedPrompt], params: SamplingParams) -> None:
        """Queue all prompts, or none: ApiError 429 if the queue is full, 400 for values that the engine refuses."""
        most = self.model.engine.core.options.max_waiting
        if (count := len(prompts) * params.sequences) > most:
            raise ApiError(
                f"the request asks for {count} sequences; this server's queue takes {most}",
                param="n" if len(prompts) == 1 else "prompt",
            )
        try:
            for prompt in prompts:
                self.generations.append(self.model.engine.submit(prompt.ids, params, image=prompt.image))
        except QueueFull as error:
            self.cancel()
            raise too_busy(str(error).removesuffix(": try again later")) from None
        except EngineClosed:
            self.cancel()
            raise self._interruption() from None
        except ValueError as error:
            self.cancel()
            raise refused_value(error, vars(params)) from None
        self._timer = asyncio.get_running_loop().call_later(self.seconds, self._expire)

    def _expire(self) -> None:
        self._expired = True
        self.cancel()

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta]]:
        """(index of the prompt, delta) as they come.

        ApiError: 408 when the time is up, 503 if the server stops, 400 or 500 for an error of the engine.
        """
        source = self._merged() if len(self.generations) > 1 else self._single()
        try:
            async for index, delta in source:
                if delta.finish == "cancelled":
                    raise self._interruption()
                if self.first is None and delta.tokens:
                    self.first = time.perf_counter()
                    self.metrics.first_token.labels(self.name).observe(self.first - self.started)
                yield index, delta
        except EngineClosed:
            raise self._interruption() from None
        except ValueError as error:  # of a format that leaves no token, for example
            raise refused_value(error) from None
        finally:
            await source.aclose()
            self.close()

    def _interruption(self) -> ApiError:
        if self._expired:
            return timed_out(self.seconds)
        return ApiError(
            "the server is stopping: send the request again",
            status=503,
            code="server_stopping",
            headers={"Retry-After": "5"},
        )

    async def begin(self) -> None:
        """Wait for the first delta, so that an error of the prompt, as of an image, comes before the answer begins."""
        try:
            self._ahead = await anext(self.generations[0])
        except EngineClosed:
            self.close()
            raise self._interruption() from None
        except ValueError as error:
            self.close()
            raise refused_value(error) from None
        except BaseException:
            self.close()
            raise

    async def _single(self) -> AsyncGenerator[tuple[int, Delta]]:
        if self._ahead is not None:
            yield 0, self._ahead
        async for delta in self.generations[0]:
            yield 0, delta

    async def _merged(self) -> AsyncGenerator[tuple[int, Delta]]:
        """The deltas of several generations in the order in which they come."""
        queue: asyncio.Queue[tuple[int, Delta] | BaseException | None] = asyncio.Queue()

        async def forward(index: int, generation: Any) -> None:
            try:
                async for delta in generation:
                    queue.put_nowait((index, delta))
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        tasks = [asyncio.create_task(forward(i, g)) for i, g in enumerate(self.generations)]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if item is None:
                    left -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    async def completions(self, best_of: bool = False) -> list[list[Completion]]:
        """The sequences of each prompt, at the end; with `best_of` the best ones."""
        if best_of:
            return await self._best()
        found: list[dict[int, Completion]] = [{} for _ in self.generations]
        async for prompt, delta in self.deltas():
            sequences = found[prompt]
            if delta.index not in sequences:
                sequences[delta.index] = Completion(delta.index)
            sequences[delta.index].add(delta)
        return [[sequences[index] for index in sorted(sequences)] for sequences in found]

    async def _best(self) -> list[list[Completion]]:
        try:
            found = [await generation.completions() for generation in self.generations]
        except EngineClosed:
            raise self._interruption() from None
        except ValueError as error:
            raise refused_value(error) from None
        finally:
            self.close()
        if any(one.finish == "cancelled" for some in found for one in some):
            raise self._interruption()
        return found

    def usage(self) -> dict[str, Any]:
        """OpenAI's counts of tokens, so far. The prompt's are counted once, whatever `n` is."""
        prompt = sum(g.usage.prompt for g in self.generations)
        cached = sum(g.usage.cached for g in self.generations)
        new = sum(g.usage.completion for g in self.generations)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def cancel(self) -> None:
        """Stop all generations."""
        for generation in self.generations:
            generation.cancel()

    def close(self) -> None:
        """Stop what still runs, and count the tokens once."""
        self.cancel()
        if self._timer is not None:
            self._timer.cancel()
        if self._counted:
            return
        self._counted = True
        usage = self.usage()
        self.metrics.prompt_tokens.labels(self.name).inc(usage["prompt_tokens"])
        self.metrics.new_tokens.labels(self.name).inc(usage["completion_tokens"])
        if self.first is not None and usage["completion_tokens"] > 1:
            spent = time.perf_counter() - self.first
            sequences = max(1, len(self.generations))
            self.metrics.each_token.labels(self.name).observe(
                spent / max(1, usage["completion_tokens"] / sequences - 1)
            )
