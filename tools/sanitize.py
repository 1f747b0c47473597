"""Runs the tests of the native kernels with the address and undefined-behaviour sanitizers.

`python tools/sanitize.py [arguments of pytest]`. Copies the package and compiles its kernels with
`-fsanitize=address,undefined`. The first error aborts the process and is reported. Needs g++ on Linux.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import native_tests

ROOT = Path(__file__).parents[1]
FLAGS = (
    *("-O1", "-g", "-fno-omit-frame-pointer"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)
# Python and the frameworks do not free all memory at exit, and some of their libraries define symbols twice.
ASAN = "detect_leaks=0:detect_odr_violation=0:abort_on_error=1"
UBSAN = "print_stacktrace=1:abort_on_error=1"
# Compilation with sanitizers takes minutes for each level.
BUILD = """
from monoblock.native import build
outcome = build.build(extra={flags!r}, seconds=3600)
print(outcome.line, flush=True)
assert outcome.levels == tuple(build.levels()), "a level was not built"
"""


def main(arguments: list[str]) -> int:
    """Returns the exit status of the tests."""
    runtimes = [_runtime(name) for name in ("libasan.so", "libubsan.so")]
    with tempfile.TemporaryDirectory(prefix="monoblock-sanitize-") as scratch:
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / "src" / "monoblock", Path(scratch) / "monoblock", ignore=ignored)
        environment = {**os.environ, "PYTHONPATH": scratch}
        subprocess.run([sys.executable, "-c", BUILD.format(flags=FLAGS)], env=environment, check=True)
        environment |= {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": ASAN, "UBSAN_OPTIONS": UBSAN}
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *native_tests.paths(), *arguments],
            env=environment,
            cwd=ROOT,
            check=False,
        ).returncode


def _runtime(name: str) -> str:
    command = os.environ.get("CXX", "g++")
    found = subprocess.run(
        [command, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        raise SystemExit(f"{command} has no {name}: install its sanitizers")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
