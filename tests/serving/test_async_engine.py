"""The engine in a thread of its own: streams, cancellation at any time, errors, limits, closing."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
from serving_models import Answer, engine, prompt_of, run

from monoblock.serving.engine.async_engine import AsyncEngine, EngineClosed
from monoblock.serving.engine.params import SamplingParams
from monoblock.serving.engine.results import Delta, QueueFull

NAME = "MptForCausalLM"
PARAMS = SamplingParams(temperature=0.9, seed=5, max_tokens=20, ignore_eos=True)


async def started(**options: Any) -> AsyncEngine:
    found = AsyncEngine(engine(NAME, **options))
    found.start()
    return found


def expected_text(prompt: list[int], params: SamplingParams = PARAMS) -> list[str]:
    return [completion.text for completion in run(engine(NAME), prompt, params).completions]


def test_many_at_once_and_cancellations() -> None:
    """Cancelled at random times, also before they begin; the others are answered as alone; nothing is left."""

    async def main() -> None:
        rng = np.random.default_rng(0)
        served = await started()
        prompts = [prompt_of(rng, int(rng.integers(1, 90))) for _ in range(40)]

        async def client(index: int) -> list[str] | None:
            generation = served.submit(prompts[index], PARAMS)
            limit = int(rng.integers(0, 8)) if index % 3 == 0 else None
            if limit == 0:
                generation.cancel()
            texts = [""]
            async for delta in generation:
                texts[0] += delta.text
                if limit is not None:
                    limit -= 1
                    if limit == 0:
                        generation.cancel()
            return None if index % 3 == 0 else texts

        found = await asyncio.gather(*(client(index) for index in range(len(prompts))))
        for prompt, texts in zip(prompts, found, strict=True):
            if texts is not None:
                assert texts == expected_text(prompt)
        stats = served.stats()
        assert (stats.running, stats.waiting, stats.cache_used) == (0, 0, 0)
        await served.close()

    asyncio.run(main())


def test_completions_and_usage() -> None:
    async def main() -> None:
        served = await started()
        prompt = prompt_of(np.random.default_rng(1), 70)
        generation = served.submit(prompt, PARAMS.replaced(n=3))
        completions = await generation.completions()
        assert [completion.text for completion in completions] == expected_text(prompt, PARAMS.replaced(n=3))
        assert (generation.usage.prompt, generation.usage.completion) == (70, 60)
        assert generation.prompt == prompt
        # The likelier ones of more.
        best = await served.submit(prompt, PARAMS.replaced(n=2, best_of=5, logprobs=0)).completions()
        every = Answer(PARAMS.replaced(n=5, logprobs=0))
        core = engine(NAME)
        core.add(prompt, PARAMS.replaced(n=5, logprobs=0), sink=every)
        while core.step():
            pass
        means = {
            one.text: sum(e.logprob for e in one.logprobs) / len(one.logprobs) for one in every.completions
        }
        assert [one.text for one in best] == sorted(means, key=means.__getitem__, reverse=True)[:2]
        await served.close()

    asyncio.run(main())


def test_errors_reach_their_request() -> None:
    async def main() -> None:
        served = await started(max_waiting=2)
        with pytest.raises(ValueError, match="vocabulary"):
            served.submit([10**6], PARAMS)
        with pytest.raises(QueueFull):
            served.submit([1], PARAMS.replaced(n=3))
        with pytest.raises(ValueError, match="takes no images"):
            await served.submit("a", PARAMS, image=object()).completions()
        wrong = {"type": "json_schema", "schema": {"type": "nothing"}}
        with pytest.raises(ValueError, match="response_format"):
            await served.submit([1], PARAMS.replaced(response_format=wrong)).completions()

        def raises(ids: Any, scores: Any) -> Any:
            raise RuntimeError(f"mine, after {ids.shape[1]} tokens")

        bad = served.submit([1, 2], PARAMS.replaced(logits_processors=[raises]))
        good = served.submit([3], PARAMS)
        with pytest.raises(RuntimeError, match="mine, after 2"):
            await bad.completions()
        assert [one.text for one in await good.completions()] == expected_text([3])
        await served.close()
        with pytest.raises(EngineClosed):
            served.submit([1], PARAMS)

    asyncio.run(main())


def test_a_failed_step_ends_its_requests_and_no_later_one() -> None:
    async def main() -> None:
        served = await started()
        step = served.core.runner.run

        def fails(chunks: Any) -> Any:
            served.core.runner.run = step  # type: ignore[method-assign]
            raise RuntimeError("no memory")

        served.core.runner.run = fails  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="no memory"):
            await served.submit([1], PARAMS).completions()
        assert [one.text for one in await served.submit([3], PARAMS).completions()] == expected_text([3])
        assert served.stats().cache_used == 0
        await served.close()

    asyncio.run(main())


@pytest.mark.parametrize("drain", [True, False])
def test_closing(drain: bool) -> None:
    """Draining finishes what runs; else it is cancelled."""

    async def main() -> None:
        served = await started()
        generation = served.submit([1, 2, 3], PARAMS.replaced(max_tokens=150))
        first = await anext(generation)
        closing = asyncio.create_task(served.close(drain=drain))
        rest = [delta async for delta in generation]
        await closing
        assert isinstance(first, Delta)
        assert rest[-1].finish == ("length" if drain else "cancelled")
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("engine")]

    asyncio.run(main())


def test_functions_run_between_steps() -> None:
    async def main() -> None:
        served = await started()
        generation = served.submit([1, 2, 3], PARAMS)
        assert await served.run(lambda: threading.current_thread().name) == "engine MptForCausalLM"
        with pytest.raises(ZeroDivisionError):
            await served.run(lambda: 1 // 0)
        assert [one.text for one in await generation.completions()] == expected_text([1, 2, 3])
        await served.close()

    asyncio.run(main())
