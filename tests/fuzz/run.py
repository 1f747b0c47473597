"""Runs the fuzzers: `python tests/fuzz/run.py [--inputs 20000] [--reader NAME] [--keep FOLDER]`.

Each reader runs in its own process, which is restarted after an input that crashes or hangs it. The number of an input
is its seed: `--first N --inputs 1` repeats one of them. The last lines of the output are the table of docs/security.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import selectors
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
TIMEOUT = 300  # seconds without output of the process, whose limit for an input is 10 s of processor time


def worker(name: str, first: int, last: int, keep: Path | None) -> None:
    """Reads inputs and prints a line before and after each."""
    import readers
    from harness import attempt

    readers.quiet()
    out = os.fdopen(os.dup(1), "w")
    with open(os.devnull, "w") as null:  # noqa: PTH123
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    with readers.prepared(readers.reader(name)) as one:
        for number in range(first, last):
            print(f"begin {number}", file=out, flush=True)
            folder, restore, size = one.mutated(number)
            outcome = attempt(lambda folder=folder: one.read(folder), size=size)
            if keep is not None and outcome.kind == "failed":
                _copy(keep, name, number, folder)
            restore()
            print(f"end {outcome.kind} {outcome.seconds:.3f} {outcome.what}", file=out, flush=True)


def _copy(keep: Path, name: str, number: int, folder: Path) -> None:
    import shutil

    target = keep / f"{name.partition(' ')[0].strip(',')}-{number}"
    shutil.copytree(folder, target, dirs_exist_ok=True)


class Run:
    """All inputs of one reader, in one or more processes."""

    def __init__(self, name: str, first: int, count: int, keep: Path | None):
        self.name, self.next, self.last, self.keep = name, first, first + count, keep
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.slowest = 0.0

    def run(self) -> None:
        while self.next < self.last:
            self._process()

    def _process(self) -> None:
        arguments = [sys.executable, __file__, "--worker", "--reader", self.name]
        arguments += ["--first", str(self.next), "--inputs", str(self.last - self.next)]
        arguments += ["--keep", str(self.keep)] if self.keep else []
        current: int | None = None
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            selector = selectors.DefaultSelector()
            selector.register(process.stdout, selectors.EVENT_READ)
            rest, hung = b"", False
            while True:
                if not selector.select(TIMEOUT if current is not None else 300):
                    process.kill()
                    hung = True
                    break
                data = os.read(process.stdout.fileno(), 65536)
                if not data:
                    break
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    current = self._line(line.decode(), current)
            errors = process.stderr.read().decode(errors="replace")
            process.wait()
        if self.next < self.last:
            if current is None:
                raise RuntimeError(f"{self.name} does not start: {errors[-2000:]}")
            outcome = "hung" if hung else f"exited with {process.returncode}"
            self._failed(current, f"the process {outcome}")
            self.next = current + 1

    def _line(self, line: str, current: int | None) -> int | None:
        word, _, rest = line.partition(" ")
        if word == "begin":
            return int(rest)
        kind, seconds, what = rest.split(" ", 2)
        self.slowest = max(self.slowest, float(seconds))
        assert current is not None
        self.next = current + 1
        if kind == "failed":
            self._failed(current, what)
        else:
            self.counts[kind] += 1
        return current

    def _failed(self, number: int, what: str) -> None:
        self.counts["failed"] += 1
        self.failures.append(f"{number}: {what}")
        print(f"{self.name} {number}: {what}", flush=True)

    def row(self) -> str:
        total = sum(self.counts.values())
        return (
            f"| {self.name} | {total:,} | {self.counts['read']:,} | {self.counts['refused']:,} | "
            f"{self.counts['failed']:,} | {self.slowest:.1f} |"
        )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000, help="for each reader")
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--reader", action="append", help="a reader, instead of all; may be repeated")
    parser.add_argument("--keep", type=Path, help="folder for copies of inputs that fail")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given: Any = parser.parse_args(arguments)
    if given.worker:
        worker(given.reader[0], given.first, given.first + given.inputs, given.keep)
        return 0
    import readers

    names = given.reader or [one.name for one in readers.READERS]
    rows, failed = (
        ["| reader | inputs | read | refused | failed | slowest, s |", "|---|---|---|---|---|---|"],
        0,
    )
    for name in names:
        start = time.monotonic()
        run = Run(name, given.first, given.inputs, given.keep)
        with contextlib.suppress(KeyboardInterrupt):
            run.run()
        rows.append(run.row())
        failed += run.counts["failed"]
        print(f"{rows[-1]}  ({time.monotonic() - start:.0f} s)", flush=True)
    print("\n".join(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
