"""Compiles the native kernels, once for each instruction set of this architecture.

`pip install` runs it through the build hook; after a change of the sources, run `python -m monoblock.native.build`.
It needs only Python and a C++ compiler: `CXX`, or the first of c++, g++ and clang++ that is installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent

_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_VNNI_BF16 = (*_AVX512, "-mavx512vnni", "-mavx512bf16")

# From the lowest to the highest: `mb_level` returns an index of this table. Other architectures have only the first.
LEVELS: dict[str, tuple[str, ...]] = {
    "base": ("-O2",),  # for CPUs of before 2013: small rather than fast
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_vnni_bf16": _VNNI_BF16,
    "avx512_amx": (*_VNNI_BF16, "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
}

# No -march=native: a build may run on another machine. Contraction fuses multiplications and additions (FMA).
FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-fPIC",
    "-shared",
)
# Symbols are left out, but not from builds with further flags, which are for sanitizers.
STRIP = ("-s",)


@dataclass(frozen=True)
class Outcome:
    """The result of a build: the levels that are available, and a message of one line."""

    levels: tuple[str, ...]
    line: str


def path_of(level: str, folder: Path = HERE) -> Path:
    """The path of a level's library."""
    return folder / f"kernels_{level}.so"


def sources() -> list[Path]:
    """The source files."""
    return [HERE / "kernels.cpp", *sorted(HERE.glob("*.hpp"))]


def digest() -> str:
    """A hash of the current sources and flags; a library contains the one that it was built from."""
    found = hashlib.sha256(repr((FLAGS, LEVELS)).encode())
    for path in sources():
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def levels() -> dict[str, tuple[str, ...]]:
    """The levels of this architecture, with their compiler flags."""
    return LEVELS if platform.machine().lower() in ("x86_64", "amd64") else {"base": ()}


def compiler(environ: Mapping[str, str] = os.environ) -> list[str] | None:
    """The C++ compiler's command: CXX, or the first one found."""
    if chosen := shlex.split(environ.get("CXX", "")):
        return chosen if shutil.which(chosen[0]) else None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def ready(folder: Path = HERE) -> Outcome | None:
    """The result of an earlier build of the same sources, if every level is there; else None."""
    mark, paths = digest().encode(), [path_of(level, folder) for level in levels()]
    if all(path.is_file() and mark in path.read_bytes() for path in paths):
        return Outcome(tuple(levels()), "monoblock's native kernels are up to date")
    return None


def build(folder: Path = HERE, extra: tuple[str, ...] = (), seconds: float = 600) -> Outcome:
    """Compile every level into `folder`. A level that fails to compile, or takes longer than `seconds`, is left out,
    and the result's message gives the reason. `extra`: further compiler flags."""
    outcome = _build(folder, extra, seconds)
    for level in set(LEVELS) - set(outcome.levels):
        path_of(level, folder).unlink(missing_ok=True)  # of an earlier build
    return outcome


def _build(folder: Path, more: tuple[str, ...], seconds: float) -> Outcome:
    command = compiler()
    if command is None:
        named = os.environ.get("CXX")
        missing = f"CXX={named!r} was not found" if named else "no C++ compiler (g++ or clang++) was found"
        return Outcome(
            (),
            f"monoblock is installed without its native kernels: {missing}; PyTorch's kernels are used instead.",
        )
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
        openmp = _openmp(command, Path(scratch))
        flags = (*FLAGS, *(() if more else STRIP), f'-DMB_SOURCES="{digest()}"', *openmp, *more)

        def one(level: str, own: tuple[str, ...]) -> str:
            made = Path(scratch) / path_of(level).name
            errors = _run([*command, *flags, *own, str(HERE / "kernels.cpp"), "-o", str(made)], seconds)
            if not errors:
                made.replace(path_of(level, folder))  # atomically
            return errors

        with ThreadPoolExecutor(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
        ) as pool:
            # The highest levels take longest: they start first.
            errors = dict(
                zip(
                    wanted := [*reversed(levels())],
                    pool.map(one, wanted, map(LEVELS.get, wanted)),
                    strict=True,
                )
            )
    built = tuple(level for level in levels() if not errors[level])
    if not built:
        return Outcome((), f"monoblock is installed without its native kernels: {_last(errors['base'])}")
    line = f"monoblock's native kernels were built by {command[0]}: {', '.join(built)}"
    failed = [f"{level} ({_last(text)})" for level, text in errors.items() if text]
    line = f"{line}; not {', '.join(failed)}" if failed else line
    return Outcome(built, line if openmp else f"{line}; without OpenMP: single-threaded")


def _openmp(command: list[str], scratch: Path) -> tuple[str, ...]:
    """The flag for OpenMP, if the compiler and its runtime support it."""
    probe = scratch / "probe.cpp"
    probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n", encoding="utf-8")
    return () if _run([*command, "-fopenmp", str(probe), "-o", str(scratch / "probe")]) else ("-fopenmp",)


def _run(command: list[str], seconds: float = 600) -> str:
    """The command's errors, or "". After `seconds`, it and the processes that it has started are killed."""
    groups = hasattr(os, "killpg")
    try:
        process = subprocess.Popen(
            command,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=groups,
        )
    except OSError as error:
        return str(error)
    with process:
        try:
            errors = process.communicate(timeout=seconds)[1]
        except subprocess.TimeoutExpired:
            if groups:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            return f"{command[0]} took more than {seconds:g} s"
    return (
        "" if process.returncode == 0 else errors.strip() or f"{command[0]} exited with {process.returncode}"
    )


def _last(errors: str) -> str:
    """The first line that reports an error, of a compiler's output."""
    lines = [line.strip() for line in errors.splitlines() if "error" in line.lower()]
    return (lines or errors.splitlines() or ["unknown error"])[0]


if __name__ == "__main__":
    outcome = build()
    print(outcome.line)
    sys.exit(not outcome.levels)
