"""Clients of the backends: a worker process, or llama.cpp's benchmark program."""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from figures import BEFORE, LOSSLESS

BENCH = Path(__file__).parent
BACKENDS = (
    "monoblock",
    BEFORE,
    LOSSLESS,
    "monoblock, plain",
    "transformers",
    "llama.cpp",
    "OpenVINO",
    "CTranslate2",
)
# Forms of the weights that each backend supports on a CPU.
FORMS = {
    "monoblock": ("float32", "bfloat16", "int8", "int4"),
    BEFORE: ("float32", "bfloat16", "int8", "int4"),
    LOSSLESS: ("bfloat16",),
    "monoblock, plain": ("float32", "bfloat16"),  # quantised weights need the native kernels to be fast
    "transformers": ("float32", "bfloat16"),
    "llama.cpp": ("float32", "bfloat16", "int8", "int4"),
    "OpenVINO": ("float32", "bfloat16", "int8", "int4"),
    "CTranslate2": ("float32", "int8"),
}
# Models that a converter does not support.
UNKNOWN = {
    "llama.cpp": ("gpt-neo-125m", "openai-gpt"),
    "CTranslate2": ("mpt-1b", "gpt-neo-125m", "openai-gpt"),
    "OpenVINO": (),
}
# Backends that need converted models and their own Python.
OWN_FORMAT = ("llama.cpp", "OpenVINO", "CTranslate2")
TRIES = 3
TIMEOUT = 300  # seconds; one question is one call of a model
SEED_STEP = 1000  # between the seeds of two prompts
PAUSE = 0.3  # seconds until the threads of the previous backend stop spinning


class Failed(Exception):
    """A failed call of a backend; the message has the reason."""


class Busy(Failed):
    """Other load on the machine makes the time unmeasurable."""


@dataclass
class Tools:
    """The Pythons of peers, llama.cpp's programs, another checkout of monoblock, and the folder of models."""

    models: Path
    threads: int
    pythons: dict[str, str] = field(default_factory=dict[str, str])
    llama_bench: str | None = None
    llama_convert: str | None = None
    before: Path | None = None

    def missing(self, who: str) -> str:
        """Why a backend is unavailable; empty if it is available."""
        if who == BEFORE:
            return "" if self.before else "no --before CHECKOUT"
        if who == "llama.cpp":
            return "" if self.llama_bench else "no --llama-bench PATH"
        if who in OWN_FORMAT and who not in self.pythons:
            return f"no --peer-python {who}=PATH"
        package = {"OpenVINO": "openvino_genai", "CTranslate2": "ctranslate2"}.get(who, who.split(",")[0])
        probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
        found = subprocess.run([self.python(who), "-c", probe], capture_output=True, check=False)
        return f"{package} is not installed in {self.python(who)}" if found.returncode else ""

    def environment(self, who: str) -> dict[str, str]:
        """The environment variables of a backend's processes."""
        found = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        if who == "monoblock, plain":
            found["MONOBLOCK_NATIVE"] = "0"
        if who == BEFORE:
            found["PYTHONPATH"] = str(self.before and self.before.resolve() / "src")
        return found

    def python(self, who: str) -> str:
        """The Python of a backend."""
        return self.pythons.get(who, sys.executable)


def weights_for(who: str, source: Path, form: str, tools: Tools) -> Path:
    """The folder or file that a backend loads: the source, or a converted or quantised copy next to it."""
    if who == LOSSLESS:
        who, form = "monoblock", "lossless"
    if who not in OWN_FORMAT and form in ("float32", "bfloat16"):
        return source
    target = source.with_name(f"{source.name}--{who.replace('.', '')}-{form}")
    if who == "llama.cpp":
        return _gguf(source, target.with_suffix(".gguf"), form, tools)
    # The files are the same for float32 and bfloat16, which is selected when they are loaded.
    if who == "OpenVINO" and form == "float32":
        target = source.with_name(f"{source.name}--{who}-bfloat16")
    if not target.is_dir():
        worker = [tools.python(who), str(BENCH / "worker.py"), who, "--prepare"]
        kind = "bfloat16" if target.name.endswith("bfloat16") else form
        _make(target, [*worker, str(source), "{}", kind], tools.environment(who))
    return target


def _gguf(source: Path, target: Path, form: str, tools: Tools) -> Path:
    if target.is_file():
        return target
    if form in ("float32", "bfloat16"):
        if tools.llama_convert is None:
            raise Failed(f"{target.name} is missing, and there is no --llama-convert PATH to create it")
        kind = {"float32": "f32", "bfloat16": "bf16"}[form]
        command = [tools.python("llama.cpp"), tools.llama_convert, str(_with_upstream_class(source))]
        _make(target, [*command, "--outtype", kind, "--outfile", "{}"])
        return target
    assert tools.llama_bench
    quantize = str(Path(tools.llama_bench).with_name("llama-quantize"))
    plain = str(weights_for("llama.cpp", source, "bfloat16", tools))
    _make(target, [quantize, plain, "{}", {"int8": "Q8_0", "int4": "Q4_0"}[form], str(tools.threads)])
    return target


def _with_upstream_class(source: Path) -> Path:
    """A copy with llm-foundry's spelling of MPT's class, which llama.cpp's converter needs."""
    config = json.loads((source / "config.json").read_text())
    if config["model_type"] != "mpt":
        return source
    copy = source.with_name(f"{source.name}--upstream-class")
    copy.mkdir(exist_ok=True)
    for file in source.iterdir():
        if not (copy / file.name).exists():
            (copy / file.name).symlink_to(file)
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(config | {"architectures": ["MPTForCausalLM"]}))
    return copy


def _make(target: Path, command: list[str], environment: dict[str, str] | None = None) -> None:
    """Runs a command that writes to the path `{}`, which is renamed to `target` on success."""
    unfinished = target.with_name(f"unfinished-{target.name}")
    done = subprocess.run(
        [str(unfinished) if argument == "{}" else argument for argument in command],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        raise Failed(f"writing {target.name} failed: {_last_line(done.stderr)}")
    unfinished.rename(target)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


class Process:
    """A worker process with one model."""

    def __init__(self, who: str, tools: Tools) -> None:
        self.who, self.facts = who, dict[str, Any]()
        self.log = tools.models / f"{who.replace(', ', '-')}.log"
        self.process = subprocess.Popen(
            [tools.python(who), str(BENCH / "worker.py"), who],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            env=tools.environment(who),
        )

    def ask(self, do: str, **question: Any) -> dict[str, Any]:
        """Sends a question and returns the answer."""
        assert self.process.stdin and self.process.stdout
        time.sleep(PAUSE)
        try:
            print(json.dumps({"do": do} | question), file=self.process.stdin, flush=True)
            if not select.select([self.process.stdout], [], [], TIMEOUT)[0]:
                self.process.kill()
                raise Failed(f"{self.who}: no answer to {do} in {TIMEOUT} s")
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise Failed(f"{self.who}: {_last_line(self.log.read_text(errors='replace'))}")
        return json.loads(answer)

    def start(self, architecture: str) -> None:
        """Imports the library; adds the time to `facts`."""
        self.facts |= self.ask("start", architecture=architecture)

    def load(self, folder: Path, form: str) -> None:
        """Loads a model; adds time and memory to `facts`."""
        self.facts |= self.ask("load", folder=str(folder), form=form)

    def prefill(self, tokens: int, vocab: int, seed: int) -> dict[str, float]:
        """Seconds and MB of a prompt and one new token."""
        return self.ask("generate", batch=1, length=tokens, vocab=vocab, new=1, seed=seed)

    def decode(self, batch: int, prompt: int, new: int, vocab: int, seed: int) -> float:
        """Seconds of `new` tokens per sequence, without the prompt and the first token."""
        sizes = {"batch": batch, "length": prompt, "vocab": vocab}
        for attempt in range(TRIES):
            # Different prompts, since some backends cache them.
            seeds = [seed + SEED_STEP * (2 * attempt + half) for half in (0, 1)]
            first = self.ask("generate", new=1, seed=seeds[0], **sizes)["seconds"]
            if (seconds := self.ask("generate", new=1 + new, seed=seeds[1], **sizes)["seconds"] - first) > 0:
                return seconds
        raise Busy(f"{self.who}: the machine is too busy to time {new} tokens")

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


class LlamaBench:
    """llama.cpp through llama-bench, or through llama-batched-bench beside it for batches; one run for each figure."""

    def __init__(self, tools: Tools) -> None:
        assert tools.llama_bench
        self.who, self.facts, self.tools = "llama.cpp", dict[str, Any](), tools
        self.model = ""

    def start(self, architecture: str) -> None:
        """Does nothing: the class is in the file."""
        del architecture

    def load(self, folder: Path, form: str) -> None:
        """Loads the model and generates a token; sets `facts`. The form is that of the file."""
        del form
        self.model = str(folder)
        begin = time.perf_counter()
        row, peak = self._run("-p", "0", "-n", "1", "--no-warmup")
        self.facts = {
            "import s": 0.0,
            "load s": time.perf_counter() - begin - row["avg_ns"] / 1e9,
            "first token s": row["avg_ns"] / 1e9,
            "load peak MB": peak / 1e6,
            "weight bytes": row["model_size"],
            "versions": {"llama.cpp": row["build_commit"]},
        }

    def prefill(self, tokens: int, vocab: int, seed: int) -> dict[str, float]:
        """Seconds and MB of a prompt of random tokens."""
        del vocab, seed
        row, peak = self._run("-p", str(tokens), "-n", "0")
        return {"seconds": row["avg_ns"] / 1e9, "MB": peak / 1e6}

    def decode(self, batch: int, prompt: int, new: int, vocab: int, seed: int) -> float:
        """Seconds of `new` tokens per sequence after a prompt."""
        del vocab, seed
        if batch > 1:
            return self._batch(batch, prompt, new)
        return self._run("-p", "0", "-n", str(new), "-d", str(prompt))[0]["avg_ns"] / 1e9

    def _batch(self, batch: int, prompt: int, new: int) -> float:
        assert self.tools.llama_bench
        program = Path(self.tools.llama_bench).with_name("llama-batched-bench")
        if not program.is_file():
            raise Failed(f"there is no {program.name} beside llama-bench, for batches")
        sizes = {"-npp": prompt, "-ntg": new, "-npl": batch, "-c": batch * (prompt + new)}
        settings = {**sizes, "-t": self.tools.threads, "-tb": self.tools.threads}
        options = [word for name, value in settings.items() for word in (name, str(value))]
        time.sleep(PAUSE)
        command = [str(program), "-m", self.model, *options, "--output-format", "jsonl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not rows:
            raise Failed(f"{program.name}: {_last_line(done.stderr)}")
        return rows[-1]["t_tg"]

    def _run(self, *options: str) -> tuple[dict[str, Any], int]:
        """The row of the output, and the peak memory of the process in bytes."""
        time.sleep(PAUSE)
        command = [str(self.tools.llama_bench), "-m", self.model, "-r", "1", "-o", "json"]
        script = [
            sys.executable,
            str(BENCH / "runners.py"),
            *command,
            "-t",
            str(self.tools.threads),
            *options,
        ]
        done = subprocess.run(script, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed(f"llama-bench: {_last_line(done.stderr)}")
        found = json.loads(done.stdout)
        return found["rows"][0], found["peak"]

    def close(self) -> None:
        """Does nothing: each run is a new process."""


def runner_of(who: str, tools: Tools) -> Process | LlamaBench:
    """The client of a backend."""
    return LlamaBench(tools) if who == "llama.cpp" else Process(who, tools)


if __name__ == "__main__":
    # In a separate process, since ru_maxrss is the maximum over all children.
    result = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(json.dumps({"rows": json.loads(result.stdout), "peak": peak}))
