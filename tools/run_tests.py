"""Every test, in a process for each framework's: `python tools/run_tests.py [--jobs N] [arguments of pytest]`.

One process for all would hold what PyTorch, JAX and TensorFlow compile and cache at once. The processes run two at a
time where the machine has the cores and the memory; all of them run, and one failure fails the whole. Each line of
output begins with its process's name, and the last one is pytest's summary over all of them.

`--bare PYTHON` is for `make test`: beside the tests run the type checker, and the core's tests with that Python, which
has no framework.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]

# The longest first, so that none of them is left alone at the end.
PARTS: dict[str, tuple[str, ...]] = {
    "torch": ("tests/torch",),
    "flax": ("tests/flax",),
    "tf": ("tests/tf",),
    "core": ("tests/core", "tests/cli", "tests/fuzz"),
    "parity": ("tests/parity",),
    "serving": ("tests/serving",),
}
# What runs beside them with --bare.
CHECKS = ("types", "bare")
# The exit status of a pytest that found no test to run, as `-k` may leave it.
NO_TESTS = 5
# A line of pytest's short summary, of its assertion reports, or of pyright that names a failure.
FAILURE = re.compile(r"(FAILED|ERROR) |E  |.* - error: ")
# The order of pytest's own summary.
OUTCOMES = ("failed", "passed", "skipped", "deselected", "xfailed", "xpassed", "error")


def default_jobs() -> int:
    """Two where there are two cores, and memory for two processes of 4 GB beside the system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not available on every system
        memory = 0
    return 2 if cores >= 2 and memory >= 10 << 30 else 1


def command_of(part: str, arguments: list[str], bare: str) -> list[str]:
    """What a part runs."""
    if part == "types":
        return [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    if part == "bare":
        return [bare, "-u", "-m", "pytest", "tests/core", *arguments]
    return [sys.executable, "-u", "-m", "pytest", *PARTS[part], *arguments]


def run(part: str, command: list[str], counts: Path, failures: list[str]) -> int:
    """Run one process and print its lines as they come; those that name a failure are also added to `failures`.

    Returns the exit status.
    """
    # Threads of OpenMP that have nothing to do would keep the cores from the other process.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "MONOBLOCK_TEST_COUNTS": str(counts)}
    if part == "bare":
        environment["MONOBLOCK_TEST_NO_FRAMEWORK"] = "1"
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            print(f"{part:6} | {line}", end="", flush=True)
            if FAILURE.match(line):
                failures.append(f"{part:6} | {line.rstrip()}")
        return process.wait()


def summary(counts: Counter[str], seconds: float) -> str:
    """In pytest's format: `1 failed, 6321 passed, 30 skipped in 650.10s (0:10:50)`."""
    found = ", ".join(f"{counts[name]} {name}" for name in OUTCOMES if counts[name])
    minutes, rest = divmod(int(seconds), 60)
    return f"{found or 'no tests ran'} in {seconds:.2f}s ({minutes // 60}:{minutes % 60:02}:{rest:02})"


def option(name: str, arguments: list[str]) -> str | None:
    """The value after that option; both are removed from the arguments."""
    if name not in arguments:
        return None
    at = arguments.index(name)
    value = arguments[at + 1]
    del arguments[at : at + 2]
    return value


def main(arguments: list[str]) -> int:
    arguments = [*arguments]
    jobs = int(option("--jobs", arguments) or default_jobs())
    bare = option("--bare", arguments)
    parts = (*PARTS, *(CHECKS if bare else ()))
    start = time.monotonic()
    total: Counter[str] = Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        files = {part: Path(scratch) / f"{part}.json" for part in parts}

        def status(part: str) -> int:
            return run(part, command_of(part, arguments, bare or ""), files[part], failures)

        statuses = dict(zip(parts, pool.map(status, parts), strict=True))
        for part, code in statuses.items():
            if files[part].is_file():
                total.update(json.loads(files[part].read_text()))
            elif code not in (0, NO_TESTS):
                total["error"] += 1  # it ended before its summary
    failed = [part for part, code in statuses.items() if code not in (0, NO_TESTS)]
    if failed:
        # Repeated here, because a log of which only the end is kept would not name them.
        print("\n".join([*failures[-40:], f"failed: {', '.join(failed)}; see the lines that begin so"]))
    print(summary(total, time.monotonic() - start), flush=True)
    return 1 if failed or not total["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
