"""An engine on a model that several processes hold: its batched step, its failure, and what is refused. The processes
themselves are in tests/distributed."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from serving_models import CLASSES, engine, model, prompt_of, run, together, tokenizer

from monoblock import LLM, SamplingParams
from monoblock.backends.pytorch.engine_adapter import ModuleRunner
from monoblock.backends.pytorch.parallel.engine import divided
from monoblock.backends.pytorch.parallel.stages import check_stages, stage_of
from monoblock.serving.engine.async_engine import AsyncEngine, EngineClosed
from monoblock.serving.engine.engine import Engine
from monoblock.tree import parameters

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


class DraftingRunner(ModuleRunner):
    """As the runners of several processes."""

    drafts = True

    def __init__(self, model: Any) -> None:
        super().__init__(model, 64, "", batched=True)
        self.sizes: list[int] = []

    def run(self, chunks: Any) -> Any:
        self.sizes.append(len(chunks))
        return super().run(chunks)


@pytest.mark.parametrize("name", CLASSES)
def test_sequences_in_one_pass_have_the_tokens_that_they_have_alone(name: str) -> None:
    rng = np.random.default_rng(0)
    prompts = [prompt_of(rng, length) for length in (5, 90, 3, 40)]
    prompts[3] = prompts[3][:10] * 4  # whose drafts are accepted sometimes
    params = [GREEDY, GREEDY.replaced(prompt_logprobs=1), GREEDY, GREEDY.replaced(speculative_tokens=4)]
    alone = [run(engine(name), prompt, one) for prompt, one in zip(prompts, params, strict=True)]
    runner = DraftingRunner(model(name))
    core = Engine(model(name), tokenizer(), runner)
    assert together(core, prompts, params) == [answer.result for answer in alone]
    assert max(runner.sizes) == 4 and not runner._caches


def test_layers_and_parameters_of_stages() -> None:
    whole = model("MistralForCausalLM")
    spec, head = whole.spec, whole.head_spec
    stages = [stage_of(spec, index, 2) for index in range(2)]
    assert [(stage.start, stage.end) for stage in stages] == [(0, 2), (2, 3)]
    for name in parameters(spec, head):
        assert sum(stage.holds(name, spec) for stage in stages) == 1 + (
            spec.tie_head and name == "embed.weight"
        )
    with pytest.raises(ValueError, match="pipeline_parallel=4: the model has 3 layers"):
        check_stages(spec, 4, "pipeline_parallel")
    chunks: Any = list("abcdefg")
    assert [list(group) for group in divided(chunks, 3)] == [["a", "b", "c"], ["d", "e", "f"], ["g"]]
    assert len(divided(chunks[:1], 3)) == 1


def test_requests_of_a_runner_that_fails_end_at_once() -> None:
    async def work() -> None:
        core = engine("MptForCausalLM")
        runner: Any = core.runner
        told: list[BaseException] = []
        watching: list[Any] = []
        runner.watch = watching.append
        failing = AsyncEngine(core)
        failing.start(told.append)
        step = runner.run

        def broken(chunks: Any) -> Any:
            if len(told_after) == 2:
                runner.failure = RuntimeError("process 1 of 2 failed")
                raise runner.failure
            told_after.append(1)
            return step(chunks)

        told_after: list[int] = []
        runner.run = broken
        running = [failing.submit([1, 2, 3], GREEDY) for _ in range(2)]
        for generation in running:
            with pytest.raises(EngineClosed, match="process 1 of 2 failed"):
                await generation.completions()
        assert [str(error) for error in told] == ["process 1 of 2 failed"]
        with pytest.raises(EngineClosed):
            failing.submit([1, 2, 3], GREEDY)
        await failing.close()
        # While nothing runs, the runner wakes the engine.
        core = engine("MptForCausalLM")
        runner = core.runner
        runner.watch = watching.append
        idle = AsyncEngine(core)
        noticed = asyncio.Event()
        idle.start(lambda _: noticed.set())
        runner.failure = RuntimeError("process 1 of 2 failed")
        watching[-1]()
        await asyncio.wait_for(noticed.wait(), 60)
        await idle.close()

    asyncio.run(work())


def test_what_is_refused() -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0: expected a number of processes"),
        (
            {"tensor_parallel_size": 2, "enable_prefix_caching": True},
            "enable_prefix_caching=True is not supp",
        ),
        ({"tensor_parallel_size": 2, "adapter": "x"}, "adapter is not supported with tensor_parallel_size=2"),
        ({"pipeline_parallel_size": 2, "tensor_parallel_size": 2}, "do not go together"),
        ({"tensor_parallel_size": 5}, "tensor_parallel=5: the 6 attention heads"),
        ({"pipeline_parallel_size": 99}, "pipeline_parallel=99: the model has "),
        (
            {"tensor_parallel_size": 2, "device": "cuda:1"},
            "device cuda:1: tensor_parallel takes auto, cpu or",
        ),
    )
    for options, words in cases:
        with pytest.raises(ValueError, match=words):
            LLM(**options)
    with pytest.raises(ValueError, match="tensor_parallel_size needs a folder or a name"):
        LLM(model("MptForCausalLM"), tokenizer=tokenizer(), tensor_parallel_size=2)
    with pytest.raises(ValueError, match="is for models that generate text"):
        LLM("demo-embeddings", tensor_parallel_size=2)


def test_a_model_in_two_processes() -> None:
    params = SamplingParams(temperature=0, max_tokens=6)
    prompts = ["def add(a, b):", "import "]
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "cache_memory": "64MB"}
    alone = [one.outputs[0].text for one in LLM(**options).generate(prompts, params)]
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        more: dict[str, Any] = {name: 2}
        llm = LLM(**options, **more)
        assert [one.outputs[0].text for one in llm.generate(prompts, params)] == alone
        llm._engine.close()
