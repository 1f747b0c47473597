"""Pipeline stages: the tokens are those of one process, and a process reads its layers alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serving_models import (  # pyright: ignore[reportMissingImports]
    CLASSES,
    engine,
    model,
    prompt_of,
    run,
    together,
)
from test_generate_command import generate
from test_serve_command import served  # pyright: ignore[reportMissingImports]
from test_serve_sharded import GREEDY, LONG, OPTIONS, SAMPLED, saved

from monoblock import LLM, SamplingParams
from monoblock.serving.engine import loading
from monoblock.serving.engine.loading import load_engine

STAGES = ("--pipeline-parallel", "2")


@pytest.mark.parametrize("name", CLASSES)
def test_requests_have_the_tokens_of_one_process(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "processor_of", lambda *_: None)  # texts alone
    rng = np.random.default_rng(0)
    prompts = [prompt_of(rng, length) for length in (5, 90, 3, 30, 4)]
    params = [GREEDY, GREEDY, SAMPLED, GREEDY, GREEDY.replaced(speculative_tokens=4)]
    alone = [run(engine(name), prompt, one).result for prompt, one in zip(prompts, params, strict=True)]
    layers = model(name).spec.layers
    core = load_engine(
        str(saved(name, tmp_path)), options=OPTIONS, device="cpu", pipeline_parallel=min(3, layers)
    )
    try:
        assert together(core, prompts, params) == alone
        # The first process has its layers and the embeddings, and no others.
        held = {n for n, p in core.model.named_parameters() if p.device != torch.device("meta")}
        path = core.model.module_paths["layers"]
        last = core.model.pipeline_stage.end
        own = {int(n.removeprefix(f"{path}.").split(".")[0]) for n in held if n.startswith(f"{path}.")}
        assert own == set(range(last)) and last < layers
        norm = core.model.module_paths.get("final_norm")  # not in all families
        assert norm is None or not [n for n in held if n.startswith(norm)]
    finally:
        core.close()


@pytest.mark.parametrize(
    "options", [("-t", "0"), ("-t", "0", "--quantize", "int8"), ("-t", "0", "--stop", "retu")]
)
def test_the_text_of_the_command_is_that_of_one_process(options: tuple[str, ...]) -> None:
    one, two = (generate(*options, "--dtype", "float32", *more) for more in ((), STAGES))
    assert two.returncode == 0, two.stderr
    assert one.stdout == two.stdout
    assert " tokens in " in two.stderr and "prompt: 7 tokens" in two.stderr


def test_a_program_and_a_process_that_dies() -> None:
    params = SamplingParams(temperature=0, max_tokens=8)
    prompts = ["def add(a, b):", "import "]
    alone = [out.outputs[0].text for out in LLM(device="cpu", dtype="float32").generate(prompts, params)]
    llm = LLM(device="cpu", dtype="float32", pipeline_parallel_size=2)
    assert [out.outputs[0].text for out in llm.generate(prompts, params)] == alone
    llm._engine.runner.peers._processes[0].kill()  # pyright: ignore
    with pytest.raises(RuntimeError, match="process 1 of 2 failed"):
        llm.generate(prompts, params)
    llm._engine.close()


def test_the_server() -> None:
    with served(*STAGES) as server:
        answers: list[Any] = [server.post(**{**LONG, "max_tokens": 20}) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].json()["choices"] == answers[1].json()["choices"]


def test_what_is_refused() -> None:
    found = generate(*STAGES, "--tensor-parallel", "2")
    assert found.returncode == 2 and "--tensor-parallel does not go with --pipeline-parallel" in found.stderr
    found = generate("--pipeline-parallel", "99")
    assert found.returncode == 1 and "pipeline_parallel=99: the model has " in found.stderr
    code = "from monoblock.cli import main; main()"
    command = [sys.executable, "-c", code, "batch", "x", "y", *STAGES, "--ray"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "--pipeline-parallel does not go with --ray" in done.stderr
