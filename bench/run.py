"""Benchmark of monoblock and other libraries on the CPU: loading, prefill, decoding, memory, accuracy.

    python bench/run.py [--quick | --full] [--models FOLDER] [--json FILE] [--minutes 15] [--only mistral-1b/int8]
        [--peer-python OpenVINO=PATH] [--peer-python CTranslate2=PATH] [--peer-python llama.cpp=PATH]
        [--llama-bench PATH] [--llama-convert PATH] [--before CHECKOUT]

Backends are processes with the same random weights that alternate round by round; ratios are of adjacent measurements.
Peers that are not installed are skipped, which is reported. PATH of --peer-python is a Python with openvino-genai,
optimum-intel and nncf; with ctranslate2 and transformers; or (llama.cpp) with the dependencies of its converter.
--llama-convert is llama.cpp's convert_hf_to_gguf.py. --before is a checkout of another commit with built kernels
(`python -m monoblock.native.build`), for measuring a change within one run. Converted models are stored in --models,
about 25 GB in all. `bench/report.py FILE` creates the tables and pictures of docs/performance.md from the JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import accuracy
import machine
import report
import runners
import shapes
from figures import BEFORE, FRESH
from plan import PLANS, PROMPT, Group, Measure
from runners import BACKENDS, FORMS, PAUSE, UNKNOWN, Busy, Failed, LlamaBench, Process, Tools

FACTS = ("import s", "load s", "first token s", "load peak MB")


class Step(Protocol):
    """Reports the current step."""

    def __call__(self, what: str, /) -> None: ...


class Run:
    """The results so far, and the settings of the run."""

    def __init__(
        self, tools: Tools, scratch: Path, quick: bool, pace: float, step: Step, memory: machine.Memory
    ) -> None:
        self.tools, self.scratch, self.quick, self.pace, self.step = tools, scratch, quick, pace, step
        self.memory = memory
        self.figures: list[dict[str, Any]] = []
        self.weights: dict[str, dict[str, int]] = {}
        self.versions: dict[str, str] = {}
        self.skipped: list[str] = []
        self.samples: list[dict[str, Any]] = []
        self.sources: dict[str, Path] = {}

    def skip(self, why: str) -> None:
        """Records what is left out, and why."""
        if why not in self.skipped:
            self.skipped.append(why)
            self.step(f"skipped: {why}")

    def group(self, group: Group) -> None:
        """Runs all measures of a group."""
        self.step(f"{group.model} {group.form}: loading")
        source = self.sources[group.model] = shapes.make(group.model, self.tools.models, quick=self.quick)
        vocab = json.loads((source / "config.json").read_text())["vocab_size"]
        folders = dict(self._folders(group, source))
        deadline = time.monotonic() + group.seconds * self.pace
        alive = self._started(group, folders)
        try:
            for measure in group.measures:
                self._measure(group, measure, alive, vocab, deadline)
            if group.accuracy:
                self._sample(group, alive, folders, vocab)
        finally:
            for runner in alive:
                runner.close()

    def _folders(self, group: Group, source: Path) -> Iterator[tuple[str, Path]]:
        for who in group.who:
            if why := self.tools.missing(who):
                self.skip(f"{who}: {why}")
            elif group.form not in FORMS[who]:
                continue  # the backend does not have this form
            elif group.model in UNKNOWN.get(who, ()):
                self.skip(f"{who}: its converter does not support {group.model}")
            else:
                with self._noted():
                    yield who, runners.weights_for(who, source, group.form, self.tools)

    def _class(self, model: str) -> str:
        return shapes.SHAPES[model].model

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except Failed as failure:
            self.skip(str(failure))

    def _started(self, group: Group, folders: dict[str, Path]) -> list[Process | LlamaBench]:
        """Starts and loads each backend `starts` times; returns those of the last start."""
        taken: dict[str, dict[str, list[float]]] = {fact: {} for fact in FACTS}
        alive: list[Process | LlamaBench] = []
        size = 4 * sum(_blocks(self.sources[group.model]).values())  # bytes of the matrices in float32
        for start in range(group.starts):
            for who, folder in folders.items():
                runner = runners.runner_of(who, self.tools)
                try:
                    runner.start(self._class(group.model))
                    machine.read_once(folder)
                    if group.fresh:
                        taken["load s"].setdefault(FRESH, []).append(machine.fresh(size, self.tools.threads))
                    runner.load(folder, group.form)
                except Failed as failure:
                    self.skip(f"{group.model} {group.form}: {failure}")
                    runner.close()
                    continue
                for fact in FACTS:
                    taken[fact].setdefault(who, []).append(runner.facts[fact])
                self.versions |= runner.facts["versions"]
                self.weights.setdefault(f"{group.model} {group.form}", {})[who] = runner.facts["weight bytes"]
                if start == group.starts - 1:
                    alive.append(runner)
                else:
                    runner.close()
        for fact, values in taken.items():
            self._record(group, fact.removesuffix(" s").removesuffix(" MB"), fact.split()[-1], values)
        return alive

    def _record(
        self,
        group: Group,
        name: str,
        unit: str,
        values: dict[str, list[float]],
        **rest: dict[str, list[float]],
    ) -> None:
        figure = {"model": group.model, "form": group.form, "measure": name, "unit": unit}
        same = next((one for one in self.figures if figure.items() <= one.items()), None)
        if same:  # further rounds of some backends
            for key, added in ({"values": values} | rest).items():
                for who, more in added.items():
                    same[key].setdefault(who, []).extend(more)
        else:
            self.figures.append(figure | {"values": values} | rest)

    def _measure(
        self, group: Group, measure: Measure, alive: list[Process | LlamaBench], vocab: int, deadline: float
    ) -> None:
        speed: dict[str, list[float]] = {}
        memory: dict[str, list[float]] = {}
        reads: dict[str, list[float]] = {}
        racing = [runner for runner in alive if measure.who is None or runner.who in measure.who]
        for round_ in range(-1 if measure.size < 4096 else 0, measure.rounds):
            if round_ > 1 and time.monotonic() > deadline:
                break
            self.step(
                f"{group.model} {group.form}: {measure.name}, round {max(round_, 0) + 1} of {measure.rounds}"
            )
            before = self._read(measure) if round_ >= 0 else 0.0
            # Odd rounds run in reverse order, so that no backend always follows the same one.
            for runner in racing[:: -1 if round_ % 2 else 1]:
                try:
                    seconds, megabytes = _timed(runner, group, measure, vocab, round_)
                except Failed as failure:
                    if round_ < 0 and isinstance(failure, Busy):
                        continue  # the time of the warm-up is not needed
                    self.skip(f"{group.model} {group.form} {measure.name}: {failure}")
                    racing = [other for other in racing if other is not runner]
                    continue
                if round_ >= 0:
                    speed.setdefault(runner.who, []).append(measure.tokens / seconds)
                    memory.setdefault(runner.who, []).append(megabytes)
                    after = self._read(measure)
                    reads.setdefault(runner.who, []).append((before + after) / 2)
                    before = after
        if measure.kind == "decode":
            self._record(group, measure.name, "tok/s", speed, **{"read GB/s": reads})
        else:
            self._record(group, measure.name, "tok/s", speed)
            self._record(group, f"{measure.name} memory", "MB", memory)

    def _read(self, measure: Measure) -> float:
        """The current read bandwidth in GB/s; 0 for measures that it does not limit."""
        if measure.kind != "decode":
            return 0.0
        time.sleep(PAUSE)
        return self.memory.rate()

    def _sample(
        self, group: Group, alive: list[Process | LlamaBench], folders: dict[str, Path], vocab: int
    ) -> None:
        self.step(f"{group.model} {group.form}: logits")
        for runner in alive:
            with self._noted():
                self.samples += accuracy.sample(runner, group.model, group.form, vocab, self.scratch)
        if "monoblock" not in folders or group.form not in FORMS["monoblock, plain"]:
            return
        plain = Process("monoblock, plain", self.tools)
        try:
            with self._noted():
                plain.start(self._class(group.model))
                plain.load(folders["monoblock"], group.form)
                self.samples += accuracy.sample(plain, group.model, group.form, vocab, self.scratch)
        finally:
            plain.close()


def _timed(
    runner: Process | LlamaBench, group: Group, measure: Measure, vocab: int, round_: int
) -> tuple[float, float]:
    """Seconds and MB; round -1 is a short warm-up."""
    seed = 100 + round_
    match measure.kind:
        case "decode":
            new = measure.new if round_ >= 0 else 2
            return runner.decode(measure.size, PROMPT, new, vocab, seed), 0.0
        case "prefill":
            found = runner.prefill(measure.size, vocab, seed)
        case _:
            assert isinstance(runner, Process)
            found = runner.ask("train", batch=4, length=measure.size, vocab=vocab, form=group.form, seed=seed)
    return found["seconds"], found["MB"]


def _wanted(groups: tuple[Group, ...], only: list[str]) -> list[Group]:
    names = {f"{group.model}/{group.form}" for group in groups}
    chosen = [g for g in groups if not only or {g.model, g.form, f"{g.model}/{g.form}"} & set(only)]
    if not chosen:
        raise SystemExit(f"--only {' '.join(only)}: none of {', '.join(sorted(names))}")
    return chosen


@contextmanager
def _progress(total: int) -> Iterator[tuple[Step, Any]]:
    """Yields functions that report a step and that advance; a progress bar in a terminal, lines elsewhere."""
    if not sys.stderr.isatty():
        yield (
            (lambda what: print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)),
            lambda: None,
        )
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bars:
        task = bars.add_task("starting", total=total)
        yield (lambda what: bars.update(task, description=what)), (lambda: bars.advance(task))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", dest="plan", action="store_const", const="quick", help="small models, a minute"
    )
    size.add_argument("--full", dest="plan", action="store_const", const="full", help="about an hour")
    parser.set_defaults(plan="essential")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir(), "monoblock-bench"))
    parser.add_argument("--json", type=Path, default=Path("bench-results.json"))
    parser.add_argument(
        "--minutes", type=float, default=15, help="time of the essential plan; fewer rounds if less"
    )
    parser.add_argument("--threads", type=int, default=machine.describe()["cores"])
    parser.add_argument("--only", action="append", default=[], help="a model, a form, or MODEL/FORM")
    parser.add_argument("--without", action="append", default=[], choices=BACKENDS[1:])
    parser.add_argument("--peer-python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--llama-bench")
    parser.add_argument("--llama-convert")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT")
    return parser.parse_args()


def _pythons(given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in given:
        name, _, path = one.partition("=")
        if name not in BACKENDS or not Path(path).is_file():
            names = ", ".join(BACKENDS[1:])
            raise SystemExit(f"--peer-python {one}: expected NAME=PATH of a Python; NAME is one of {names}")
        found[name] = path
    return found


def main() -> None:
    """Measures, writes the JSON after each group, and prints the tables."""
    from monoblock import native

    args = _arguments()
    groups = _wanted(PLANS[args.plan], args.only)
    args.models.mkdir(parents=True, exist_ok=True)
    if args.before is None:
        args.without.append(BEFORE)
    elif not (args.before / "src" / "monoblock").is_dir():
        raise SystemExit(f"--before {args.before}: expected a checkout with src/monoblock")
    pythons = _pythons(args.peer_python)
    tools = Tools(
        args.models, args.threads, pythons, args.llama_bench, args.llama_convert, before=args.before
    )
    memory = machine.Memory(args.threads)
    begin = time.time()
    results: dict[str, Any] = {
        "plan": args.plan,
        "date": time.strftime("%Y-%m-%d"),
        "threads": args.threads,
        "machine": machine.describe(),
        "limits": [machine.limits(memory)],
        "processes": machine.processes(1 if args.plan == "quick" else 5),
    }
    with tempfile.TemporaryDirectory() as scratch, _progress(len(groups) + 1) as (step, advance):
        run = Run(tools, Path(scratch), args.plan == "quick", args.minutes / 15, step, memory)
        if native.library() is None:
            run.skip(f"monoblock's native kernels: {native.status()}")
        for group in groups:
            who = tuple(name for name in group.who if name not in args.without)
            run.group(Group(**(vars(group) | {"who": who})))
            advance()
            results |= {name: getattr(run, name) for name in ("figures", "weights", "versions", "skipped")}
            results["blocks"] = {name: _blocks(source) for name, source in run.sources.items()}
            args.json.write_text(json.dumps(results, indent=1))
        step("accuracy: the reference in float32")
        results["accuracy"] = accuracy.compare(run.samples, run.sources, tools, Path(scratch))
        results["limits"].append(machine.limits(memory))
    results["minutes"] = round((time.time() - begin) / 60, 1)
    args.json.write_text(json.dumps(results, indent=1))
    print(report.tables(results))


def _blocks(source: Path) -> dict[str, int]:
    """Elements of the matrices of the blocks, the input embeddings and the head."""
    from monoblock.checkpoint.header import read_header

    sizes = {"blocks": 0, "table": 0, "head": 0}
    for name, entry in read_header(source / "model.safetensors").entries.items():
        if len(entry.shape) == 2:
            kind = (
                "head"
                if "head" in name
                else "table"
                if any(n in name for n in ("embed", "wte", "wpe"))
                else "blocks"
            )
            sizes[kind] += entry.shape[0] * entry.shape[1]
    return sizes


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
