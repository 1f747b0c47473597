"""Forward and generate of the JAX or TensorFlow classes, compared with transformers 4, the last to have them.

    python bench/peers.py --framework flax|tf [--peer-python PATH | --before CHECKOUT] [--cases mistral,gpt_neo]
        [--runs 5] [--small]

PATH is the Python of an environment with transformers 4.53 and Flax, or TensorFlow and tf-keras. Both libraries run in
processes that persist for the whole run and alternate call by call, in float32 with random weights of equal shapes.
CHECKOUT is a checkout of another commit of monoblock, which replaces the peer. Without either monoblock runs alone.

forward: one pass over the tokens, `model(ids)` under the framework's `jit` (TensorFlow: `tf.function`, with XLA).
as called: the same without `jit`.
generate, new lengths: greedy, after one warm-up call, prompts of lengths that are new to this process.
generate, same length: prompts of the warm-up's length.
generate, compiled: the same, with `jit` (or `tf.function` with XLA) around the peer's `generate`; monoblock compiles
by default.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

PROMPT, NEW = 32, 64
FULL = {
    "mistral": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        # The peers allocate a mask of its square.
        "max_position_embeddings": 2048,
    },
    "gpt_neo": {
        "hidden_size": 768,
        "num_layers": 12,
        "num_heads": 12,
        "attention_types": [[["global", "local"], 6]],
    },
    "openai_gpt": {},
    "mpnet": {"vocab_size": 30527},
}
SMALL = {
    "mistral": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    },
    "gpt_neo": {
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    },
    "openai_gpt": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "mpnet": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
}
BEFORE = "monoblock, before"
OURS = ("monoblock", BEFORE)
# Config, class without its prefix, tokens of a forward pass.
CLASSES = {
    "mistral": ("MistralConfig", "MistralForCausalLM", 512),
    "gpt_neo": ("GPTNeoConfig", "GPTNeoForCausalLM", 512),
    "openai_gpt": ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", 512),
    "mpnet": ("MPNetConfig", "MPNetModel", 384),
}
CASES = {"flax": ("mistral", "gpt_neo"), "tf": ("mistral", "openai_gpt", "mpnet")}
OPTIONS: dict[str, Any] = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "num_beams": 1,
    "pad_token_id": 0,
    "eos_token_id": None,
}

# ---------------------------------------------------------------------------- one library, in its own process


def worker(who: str, framework: str) -> None:
    """Answers the lines of stdin: `{"case": name, "small": false}` creates a model, `{"task": name, "ids": [tokens,
    seed]}` times one call of it. Output of libraries goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    tasks: dict[str, Callable[[Any], Any]] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "versions" in question:
            library, keras = who.split(",")[0], "keras" if who in OURS else "tf-keras"
            names = {"flax": (library, "jax", "flax"), "tf": (library, "tensorflow-cpu", keras)}[framework]
            answer: Any = {"versions": ", ".join(f"{name} {version(name)}" for name in names)}
        elif "case" in question:
            tasks = {}  # frees the previous model before the next one is created
            tasks = _TASKS[framework](who, _model(who, framework, question["case"], question["small"]))
            answer = {"tasks": list(tasks)}
        else:
            ids = _ids(*question["ids"])
            start = time.perf_counter()
            tasks[question["task"]](ids)
            answer = {"seconds": time.perf_counter() - start}
        print(json.dumps(answer), file=answers, flush=True)


def _ids(tokens: int, seed: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed).integers(3, 10_000, (1, tokens)).astype(np.int32)


def _model(who: str, framework: str, case: str, small: bool) -> Any:
    library: Any = __import__(who.split(",")[0])
    config, cls, _ = CLASSES[case]
    model_config = getattr(library, config)(**(SMALL if small else FULL)[case])
    return getattr(library, {"flax": "Flax", "tf": "TF"}[framework] + cls)(model_config)


def _flax(who: str, model: Any) -> dict[str, Callable[[Any], Any]]:
    import jax

    def call(params: Any, ids: Any) -> Any:
        return model(ids, params=params)[0]

    def generate(params: Any, ids: Any) -> Any:
        return model.generate(ids, params=params, **OPTIONS).sequences

    params, forward, compiled = model.params, jax.jit(call), jax.jit(generate)
    ready = jax.block_until_ready
    tasks = {
        "forward": lambda ids: ready(forward(params, ids)),
        "as called": lambda ids: ready(model(ids)[0]),
    }
    if not model.can_generate():
        return tasks
    tasks["generate"] = lambda ids: ready(model.generate(ids, **OPTIONS).sequences)
    if who not in OURS:
        tasks["compiled"] = lambda ids: ready(compiled(params, ids))
    return tasks


def _tf(who: str, model: Any) -> dict[str, Callable[[Any], Any]]:
    import tensorflow as tf

    model(tf.constant(_ids(4, 0)))
    forward = tf.function(lambda ids: model(ids, training=False)[0], jit_compile=True)
    tasks = {
        "forward": lambda ids: forward(tf.constant(ids)).numpy(),
        "as called": lambda ids: model(tf.constant(ids), training=False)[0].numpy(),
    }
    if not model.can_generate():
        return tasks
    tasks["generate"] = lambda ids: model.generate(tf.constant(ids), **OPTIONS).numpy()
    if who not in OURS and model.supports_xla_generation:
        compiled = tf.function(model.generate, jit_compile=True)
        tasks["compiled"] = lambda ids: compiled(tf.constant(ids), **OPTIONS).numpy()
    return tasks


_TASKS = {"flax": _flax, "tf": _tf}

# ---------------------------------------------------------------------------- both, alternating


class Runner:
    """A worker process; its other output is in `log`."""

    def __init__(self, who: str, python: str, framework: str, log: Path, before: Path | None) -> None:
        self.who, self.log = who, log
        # The peer's TensorFlow classes need Keras 2; ours need Keras 3.
        environment = {"TF_USE_LEGACY_KERAS": "0" if who in OURS else "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
        if who == BEFORE and before is not None:
            environment["PYTHONPATH"] = str(before.resolve() / "src")
        self.process = subprocess.Popen(
            [python, __file__, "--framework", framework, "--worker", who],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=os.environ | environment,
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        """Sends one line and waits for the answer."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps(question), file=self.process.stdin, flush=True)
        if not (answer := self.process.stdout.readline()):
            raise SystemExit(f"{self.who} failed:\n{self.log.read_text()[-3000:]}")
        return json.loads(answer)

    def end(self) -> None:
        """Ends the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def lengths(new: bool) -> Iterator[int]:
    """Prompt lengths; with `new` all different, within one length bucket of 32."""
    order = list(range(PROMPT - 15, PROMPT))
    random.Random(0).shuffle(order)
    return iter(order) if new else itertools.repeat(PROMPT)


def alternate(
    runners: list[Runner], task: dict[str, str], sizes: Iterator[int], runs: int
) -> list[list[float]]:
    """Seconds of each runner's calls."""
    took: list[list[float]] = [[] for _ in runners]
    for run, tokens in zip(range(runs), sizes, strict=False):
        for runner, times in zip(runners, took, strict=True):
            times.append(runner.ask(task=task[runner.who], ids=[tokens, run])["seconds"])
    return took


def rows_of(case: str, runners: list[Runner], args: argparse.Namespace) -> Iterator[list[str]]:
    """The rows of a model."""
    known = [set(runner.ask(case=case, small=args.small)["tasks"]) for runner in runners]
    shared, tokens = set.intersection(*known), CLASSES[case][2]
    same = [("forward", "forward", tokens), ("as called", "as called", tokens)]
    for name, task, length in same:
        one = {runner.who: task for runner in runners}
        alternate(runners, one, itertools.repeat(length), 1)
        yield row(case, name, length, runners, alternate(runners, one, itertools.repeat(length), args.runs))
    if "generate" not in shared:
        return
    one = {runner.who: "generate" for runner in runners}
    alternate(runners, one, lengths(False), 1)
    yield row(case, "generate, new lengths", NEW, runners, alternate(runners, one, lengths(True), args.runs))
    yield row(case, "generate, same length", NEW, runners, alternate(runners, one, lengths(False), args.runs))
    if len(runners) > 1 and "compiled" in known[1]:
        one[runners[1].who] = "compiled"
        alternate(runners, one, lengths(False), 1)
        yield row(
            case, "generate, compiled", NEW, runners, alternate(runners, one, lengths(False), args.runs)
        )


def row(case: str, name: str, tokens: int, runners: list[Runner], took: list[list[float]]) -> list[str]:
    """Tokens per second, each runner's median and range, and the median ratio of adjacent calls."""
    cells = [
        f"{tokens / statistics.median(times):.1f} ({tokens / max(times):.1f}-{tokens / min(times):.1f})"
        for times in took
    ]
    if len(runners) > 1:
        ratios = [peer / ours for ours, peer in zip(*took, strict=True)]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
    return [case, name, *cells]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--framework", choices=tuple(CASES), required=True)
    peer = parser.add_mutually_exclusive_group()
    peer.add_argument("--peer-python", help="Python of the peer's environment")
    peer.add_argument(
        "--before", type=Path, metavar="CHECKOUT", help="checkout of another commit of monoblock"
    )
    parser.add_argument("--cases", help="models, separated by commas")
    parser.add_argument("--runs", type=int, default=5, help="at most 15")
    parser.add_argument("--small", action="store_true", help="tiny models, for testing the script")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Starts the processes, alternates calls, and prints a table."""
    args = _arguments()
    if args.worker:
        worker(args.worker, args.framework)
        return
    pythons = {"monoblock": sys.executable}
    if args.peer_python:
        pythons["transformers"] = args.peer_python
    elif args.before:
        pythons[BEFORE] = sys.executable
    else:
        print("no --peer-python: monoblock only")
    with tempfile.TemporaryDirectory() as folder:
        runners = [
            Runner(who, python, args.framework, Path(folder, who), args.before)
            for who, python in pythons.items()
        ]
        print(f"{_machine()}; tokens per second: median (range) of {args.runs}")
        for runner in runners:
            print(f"{runner.who}: {runner.ask(versions=True)['versions']}")
        titles = ["model", "measure", *pythons, *(["ratio"] if len(runners) > 1 else [])]
        print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
        for case in args.cases.split(",") if args.cases else CASES[args.framework]:
            for cells in rows_of(case, runners, args):
                print("| " + " | ".join(cells) + " |", flush=True)
        for runner in runners:
            runner.end()


def _machine() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].split(':')[1].strip() if names else platform.processor()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
