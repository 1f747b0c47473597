"""`serve`, `batch` and `LLM` with a model that is sharded over processes: the tokens are those of one process, and a
failure of a process is an end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from helpers import randomised
from server_models import image_model
from serving_models import (  # pyright: ignore[reportMissingImports]
    CLASSES,
    Answer,
    engine,
    model,
    prompt_of,
    run,
    together,
    tokenizer,
)
from test_serve_command import Served, refused, served  # pyright: ignore[reportMissingImports]

import monoblock
from monoblock import LLM, SamplingParams
from monoblock.backends.pytorch.engine_adapter import ModuleRunner
from monoblock.serving.engine import loading
from monoblock.serving.engine.engine import Engine
from monoblock.serving.engine.loading import load_engine
from monoblock.serving.engine.options import EngineOptions

OPTIONS = EngineOptions(cache_memory=1 << 25)
GREEDY = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, seed=5, max_tokens=14, n=2, ignore_eos=True)
PARALLEL = ("--tensor-parallel", "2")


def saved(name: str, folder: Path) -> Path:
    """The checkpoint of a tiny model, with its tokenizer."""
    model(name).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def sharded(folder: Path, **options: Any) -> Engine:
    return load_engine(str(folder), options=OPTIONS, device="cpu", tensor_parallel=2, **options)


@pytest.mark.parametrize("name", CLASSES)
def test_requests_have_the_tokens_of_one_process(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "processor_of", lambda *_: None)  # texts alone
    rng = np.random.default_rng(0)
    prompts = [prompt_of(rng, length) for length in (5, 90, 3, 30, 4)]
    drafted = GREEDY.replaced(speculative_tokens=4)
    params = [GREEDY, GREEDY, SAMPLED, GREEDY, drafted]
    alone = [run(engine(name), prompt, one).result for prompt, one in zip(prompts, params, strict=True)]
    core = sharded(saved(name, tmp_path))
    try:
        assert together(core, prompts, params) == alone
        cancelled = core.add(prompts[0], GREEDY, sink=(gone := Answer(GREEDY)))
        core.step()
        core.cancel(cancelled)
        assert gone.result[0][2] == "cancelled"
        assert together(core, prompts[:2], params[:2]) == alone[:2]
    finally:
        core.close()


def test_prompts_with_images(tmp_path: Path) -> None:
    folder = image_model(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (18, 22, 3), dtype=np.uint8)
    prompts = [
        {"prompt": "what is in the box\n", "multi_modal_data": {"image": image}},
        {"prompt": "a cat", "multi_modal_data": {"image": image[:9]}},
        {"prompt": "a dog is"},
    ]

    def tokens(**options: Any) -> list[list[int]]:
        llm = LLM(str(folder), device="cpu", cache_memory=1 << 25, **options)
        with pytest.raises(ValueError):
            llm.generate({"prompt": "x", "multi_modal_data": {"image": image[:, :, :2]}}, GREEDY)
        found = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
        llm._engine.close()
        return found

    assert tokens(tensor_parallel_size=2) == tokens()


@pytest.mark.parametrize("how", ["int8", "int4"])
def test_quantised_shards(how: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = monoblock.MistralConfig(**sizes, **heads, vocab_size=len(tokenizer()))
    randomised(monoblock.MistralForCausalLM(config).eval(), std=0.3).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    prompts = [prompt_of(np.random.default_rng(1), length) for length in (5, 40)]
    model = load_engine(str(tmp_path), options=OPTIONS, device="cpu", quantize=how).model
    one = Engine(model, tokenizer(), ModuleRunner(model, 64, "the same kernels"), options=OPTIONS)
    # Kernels round activations to 8 bits, so that a difference in the last bit of a sum may grow with each token.
    few = GREEDY.replaced(max_tokens=6)
    alone = [run(one, prompt, few).result for prompt in prompts]
    core = sharded(tmp_path, quantize=how)
    try:
        assert together(core, prompts, [few, few]) == alone
    finally:
        core.close()


def test_a_program() -> None:
    prompts = ["def add(a, b):", "import "]
    params = SamplingParams(temperature=0, max_tokens=8)
    alone = [output.outputs[0].text for output in LLM(device="cpu").generate(prompts, params)]
    llm = LLM(device="cpu", tensor_parallel_size=2, cache_memory="64MB")
    assert [output.outputs[0].text for output in llm.generate(prompts, params)] == alone
    with pytest.raises(ValueError, match="it can hold one sharded model"):
        LLM(device="cpu", tensor_parallel_size=2)
    [other] = llm._engine.runner.peers._processes  # pyright: ignore
    other.kill()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="process 1 of 2 failed: it ended with exit code -9"):
            llm.generate(prompts, params)
    llm._engine.close()
    again = LLM(device="cpu", tensor_parallel_size=3)
    assert [output.outputs[0].text for output in again.generate(prompts, params)] == alone
    again._engine.close()


LONG = {"prompt": "def f(", "temperature": 0, "max_tokens": 120, "ignore_eos": True}


def others(parent: int) -> list[int]:
    """The processes that a command started, by any of its threads."""
    found: set[int] = set()
    for task in Path(f"/proc/{parent}/task").iterdir():
        found |= {int(pid) for pid in (task / "children").read_text().split()}
    return [
        pid for pid in sorted(found) if b"parallel.processes" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def ended(pid: int) -> bool:
    """Whether a process has ended, or is a zombie that nobody waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def begun(server: Served) -> tuple[threading.Thread, list[httpx.Response]]:
    """A long request that is being computed, and its answer."""
    found: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: found.append(server.post(**LONG)))
    thread.start()
    running = 'monoblock_requests_running{model="demo"} 1.0'
    while running not in server.http.get("/metrics").text:
        assert thread.is_alive()
        time.sleep(0.02)
    return thread, found


def test_the_server_finishes_its_requests_after_a_signal_to_all_processes() -> None:
    with served(*PARALLEL, "--drain-timeout", "400") as server:
        assert server.post().status_code == 200
        refused_view = server.http.post("/attention", json={"prompt": "x"})
        assert "are not shown for a model in several processes" in refused_view.text
        [other] = others(server.process.pid)
        thread, answers = begun(server)
        for pid in (other, server.process.pid):
            os.kill(pid, signal.SIGTERM)
        assert server.process.wait(400) == 0
        thread.join()
        assert answers[0].json()["usage"]["completion_tokens"] == LONG["max_tokens"]
        assert ended(other)


@pytest.mark.parametrize("busy", [True, False])
def test_the_server_ends_with_an_error_if_a_process_dies(busy: bool) -> None:
    with served(*PARALLEL) as server:
        assert server.post().status_code == 200
        thread, answers = begun(server) if busy else (None, [])
        os.kill(others(server.process.pid)[0], signal.SIGKILL)
        assert server.process.wait(200) == 1
        assert server.process.stderr is not None
        assert server.process.stderr.read() == (
            "monoblock: process 1 of 2 failed: it ended with exit code -9\n"
        )
        if thread is not None:
            thread.join()
            assert answers[0].status_code == 503 and answers[0].headers["retry-after"] == "5"


def test_the_other_processes_end_with_a_killed_server() -> None:
    with served(*PARALLEL) as server:
        assert server.post().status_code == 200
        [other] = others(server.process.pid)
        server.process.kill()
        until = time.monotonic() + 120
        while not ended(other):
            assert time.monotonic() < until
            time.sleep(0.05)


def batch(source: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "monoblock.cli", "batch", str(source), str(output), "--device", "cpu"]
    # The demo has bfloat16 weights, whose rounding would differ.
    command += ["--dtype", "float32"]
    return subprocess.Popen(
        [*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def test_a_batch_keeps_its_results_when_a_process_dies_and_continues(tmp_path: Path) -> None:
    source, output, whole = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    lines = [
        {
            "custom_id": str(i),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": f"def f{i}(", "max_tokens": 20, "temperature": 0, "ignore_eos": True},
        }
        for i in range(40)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert batch(source, whole).wait(400) == 0
    options = (*PARALLEL, "--max-sequences", "4")
    job = batch(source, output, *options)
    while not output.exists() or output.read_bytes().count(b"\n") < 8:
        time.sleep(0.01)
        assert job.poll() is None
    os.kill(others(job.pid)[0], signal.SIGKILL)
    assert job.stderr is not None
    assert job.wait(200) == 1
    assert "process 1 of 2 failed" in job.stderr.read()
    assert 8 <= output.read_bytes().count(b"\n") < 40
    assert batch(source, output, *options).wait(400) == 0
    found, expected = (
        {line["custom_id"]: line["response"]["body"]["choices"] for line in map(json.loads, path.open())}
        for path in (output, whole)
    )
    assert len(found) == 40 and found == expected


def test_what_is_refused(tmp_path: Path) -> None:
    def says(text: str, *arguments: str, code: int = 1) -> None:
        found, errors = refused(*PARALLEL, *arguments)
        assert found == code and text in errors, errors

    says("--tensor-parallel does not go with --adapter", "--adapter", "a=b", code=2)
    says("--tensor-parallel does not go with --prefix-cache", "--prefix-cache", code=2)
    says("divides one model that generates text; the models that do are: none", "demo-embeddings")
    assert "the 6 attention heads" in refused("--tensor-parallel", "4")[1]
