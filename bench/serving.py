"""Tokens per second and time to the first token of servers, with many clients at once.

    python bench/serving.py --model FOLDER [--form bf16|int8|int4] [--clients 8,16,32] [--peer NAME=COMMAND ...]
        [--texts NAME,...] [--genai PYTHON=FOLDER] [--runs 3] [--prompt 128] [--new 32] [--threads 2]

FOLDER is a model with random weights (bench/shapes.py), whose tokenizer both sides use. COMMAND starts a peer's
server with OpenAI's /v1/completions; `{port}` in it is replaced; NAME may be followed by the model's name there
(NAME:MODEL=COMMAND). `--texts`: peers that take no token ids, which get the prompts as texts and whose second turn is
not measured. `--genai`: the Python of an environment with openvino-genai, and the model converted for it; its
continuous batching pipeline runs in a process. Servers run one at a time and alternate. Every client sends two
requests in turn; all prompts differ. The engine alone (no HTTP) and a batch of 8 with `generate` are measured too,
and the first token of a second turn after a chat of 2,000 tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import shlex
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

WORDS = 30_000  # ids of the synthetic vocabulary that prompts are made of
FORMS = {"bf16": [], "int8": ["--quantize", "int8"], "int4": ["--quantize", "int4"]}
START = 600  # seconds that a server may take to start


@dataclass
class Measured:
    """Results of one server with a number of clients: tokens per second, median seconds to the first token."""

    rates: list[float] = field(default_factory=list[float])
    firsts: list[float] = field(default_factory=list[float])


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def prompt_of(tokens: int, seed: int) -> list[int]:
    """Random token ids."""
    rng = random.Random(seed)
    return [rng.randrange(100, WORDS) for _ in range(tokens)]


def text_of(ids: list[int]) -> str:
    """A text of as many tokens: letters, each a token of the tokenizers that bench/shapes.py writes."""
    return "".join(chr(ord("a") + number % 26) for number in ids)


def stream(port: int, model: str, prompt: list[int] | str, new: int) -> tuple[int, float, float]:
    """One request: tokens, seconds to the first, seconds in all."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": new,
        "temperature": 0,
        "stream": True,
    }
    if not isinstance(prompt, str):  # an option of servers of token ids
        body["ignore_eos"] = True
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START)
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {answer.read(500)!r}")
    first, count = 0.0, 0
    for line in answer:
        if line.startswith(b"data: {") and b'"choices"' in line:
            first = first or time.perf_counter() - start
            count += 1
    connection.close()
    return count, first, time.perf_counter() - start


def load(
    port: int,
    model: str,
    clients: int,
    prompt: int,
    new: int,
    seed: int,
    form: Callable[[list[int]], list[int] | str],
) -> tuple[float, float]:
    """Clients that send two requests each: tokens per second of all, and the median time to the first token. `form`
    makes of token ids what the server takes."""
    firsts: list[float] = []

    def client(number: int) -> None:
        for turn in range(2):
            ids = prompt_of(prompt, seed * 10**6 + number * 10 + turn)
            _, first, _ = stream(port, model, form(ids), new)
            firsts.append(first)

    start = time.perf_counter()
    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(firsts) != 2 * clients:
        raise RuntimeError("some requests failed")
    return 2 * clients * new / (time.perf_counter() - start), statistics.median(firsts)


@contextlib.contextmanager
def server(command: str, threads: int) -> Iterator[int]:
    """A running server: its port."""
    port = free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(
        shlex.split(command.replace("{port}", str(port))),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=None if os.environ.get("SHOW") else subprocess.DEVNULL,
    ) as process:
        try:
            _wait(process, port)
            yield port
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    """Until the server answers /health or /v1/models."""
    start = time.monotonic()
    while time.monotonic() - start < START:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}: run again with SHOW=1")
        for path in ("/health", "/v1/models"):
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                connection.request("GET", path)
                if connection.getresponse().status == 200:
                    return
        time.sleep(0.5)
    raise RuntimeError(f"the server did not answer within {START} s")


# ---------------------------------------------------------------------------- in a process of its own


def engine_worker(model: str, form: str, clients: list[int], prompt: int, new: int) -> None:
    """Prints the engine's rate without HTTP for each number of clients, and that of `generate` with a batch of 8."""
    import torch

    from monoblock import AutoModelForCausalLM
    from monoblock.serving.engine.loading import make_engine
    from monoblock.serving.engine.options import EngineOptions
    from monoblock.serving.engine.params import SamplingParams

    quantised: dict[str, Any] = {} if form == "bf16" else {"quantization_config": form}
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", **quantised)
    core = make_engine(loaded, None, options=EngineOptions(prefix_cache=False))
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    found: dict[str, float] = {}
    for count in clients:
        for warm in (True, False):
            start = time.perf_counter()
            for number in range(count):
                core.add(prompt_of(prompt, number + warm * 999), params, sink=lambda _: None)
            while core.step():
                pass
            found[f"engine {count}"] = count * new / (time.perf_counter() - start)
    ids = torch.tensor([prompt_of(prompt, number) for number in range(8)])
    for _ in range(2):
        start = time.perf_counter()
        loaded.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        found["generate 8"] = 8 * new / (time.perf_counter() - start)
    print(json.dumps(found))


GENAI = """
import json, statistics, sys, time
import numpy as np, openvino as ov, openvino_genai as og
folder, clients, prompts, new = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
scheduler = og.SchedulerConfig()
scheduler.cache_size, scheduler.max_num_batched_tokens, scheduler.enable_prefix_caching = 2, 256, False
pipe = og.ContinuousBatchingPipeline(folder, scheduler, "CPU")
config = og.GenerationConfig()
config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
found = {}
for count in clients:
    for _ in range(2):
        start, firsts = time.perf_counter(), {}
        handles = {i: pipe.add_request(i, ov.Tensor(np.array([prompts[i]])), config) for i in range(count)}
        while pipe.has_non_finished_requests():
            pipe.step()
            for i, handle in handles.items():
                if i not in firsts and handle.can_read():
                    firsts[i] = time.perf_counter() - start
        found[count] = [count * new / (time.perf_counter() - start), statistics.median(firsts.values())]
print(json.dumps(found))
"""


def genai(python: str, folder: str, clients: list[int], prompt: int, new: int) -> dict[str, list[float]]:
    """Rates and times of OpenVINO GenAI's continuous batching pipeline."""
    prompts = [prompt_of(prompt, number) for number in range(max(clients))]
    done = subprocess.run(
        [python, "-c", GENAI, folder, json.dumps(clients), json.dumps(prompts), str(new)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def second_turn(port: int, model: str) -> tuple[float, float]:
    """Seconds to the first token of a chat of 2,000 tokens, cold, and of its second turn."""
    first = prompt_of(2000, 77)
    _, cold, _ = stream(port, model, first, 4)
    _, warm, _ = stream(port, model, [*first, *prompt_of(20, 78)], 4)
    return cold, warm


def _row(name: str, values: list[str]) -> str:
    return f"| {name} | " + " | ".join(values) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--form", default="bf16", choices=list(FORMS))
    parser.add_argument("--clients", default="8,16,32")
    parser.add_argument("--peer", action="append", default=[])
    parser.add_argument("--texts", default="")
    parser.add_argument("--genai")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", action="store_true")
    given = parser.parse_args()
    clients = [int(count) for count in given.clients.split(",")]
    if given.worker:
        engine_worker(given.model, given.form, clients, given.prompt, given.new)
        return
    ours = [sys.executable, "-m", "monoblock.cli", "serve", given.model, "--port", "{port}", "--name", "m"]
    ours += ["--preload", *FORMS[given.form]]
    commands = {"monoblock": ("m", shlex.join(ours).replace("'{port}'", "{port}"))}
    for peer in given.peer:
        name, _, command = peer.partition("=")
        name, _, model = name.partition(":")
        commands[name] = (model or "m", command)
    texts = [name for name in given.texts.split(",") if name]
    if unknown := set(texts) - set(commands):
        parser.error(f"--texts: no such peer: {', '.join(sorted(unknown))}")
    forms: dict[str, Callable[[list[int]], list[int] | str]] = dict.fromkeys(commands, list)
    forms.update(dict.fromkeys(texts, text_of))
    found: dict[tuple[str, int], Measured] = {}
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for run in range(given.runs):
        for name, (model, command) in commands.items():
            with server(command, given.threads) as port:
                stream(port, model, forms[name](prompt_of(16, 5)), 4)  # warm
                for count in clients:
                    rate, first = load(port, model, count, given.prompt, given.new, run + 1, forms[name])
                    own = found.setdefault((name, count), Measured())
                    own.rates.append(rate)
                    own.firsts.append(first)
                    print(f"{name}, {count} clients: {rate:.1f} tokens/s, first {first:.2f} s", flush=True)
                if name in texts:
                    continue
                turns[name].append(second_turn(port, model))
                print(f"{name}, second turn: {turns[name][-1]}", flush=True)
        worker = [sys.executable, __file__, "--worker", "--model", given.model, "--form", given.form]
        worker += ["--clients", given.clients, "--prompt", str(given.prompt), "--new", str(given.new)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads)}
        done = subprocess.run(worker, capture_output=True, text=True, check=True, env=environment)
        for name, rate in json.loads(done.stdout.splitlines()[-1]).items():
            kind, _, count = name.rpartition(" ")
            found.setdefault((kind, int(count)), Measured()).rates.append(rate)
        if given.genai:
            python, _, folder = given.genai.partition("=")
            for count, (rate, first) in genai(python, folder, clients, given.prompt, given.new).items():
                own = found.setdefault(("OpenVINO GenAI", int(count)), Measured())
                own.rates.append(rate)
                own.firsts.append(first)
    print(_row(given.form, [f"{count} clients" for count in clients]))
    print(_row("---", ["---"] * len(clients)))
    for name in dict.fromkeys(name for name, _ in found):
        cells: list[str] = []
        for count in clients:
            own = found.get((name, count), Measured())
            cell = (
                f"{statistics.median(own.rates):.1f} ({min(own.rates):.1f}-{max(own.rates):.1f})"
                if own.rates
                else ""
            )
            cells.append(cell + (f", {statistics.median(own.firsts):.2f} s" if own.firsts else ""))
        print(_row(name, cells))
    for name, values in turns.items():
        if not values:
            continue
        cold, warm = (statistics.median(times) for times in zip(*values, strict=True))
        print(f"{name}: first token after 2,000 tokens {cold:.2f} s, of the second turn {warm:.3f} s")


if __name__ == "__main__":
    main()
