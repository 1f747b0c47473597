"""Compiles the native kernels, once for each instruction set of an architecture.

`pip install` runs it through the build hook; after a change of the sources, run `python -m monoblock.native.build`.
It needs only Python and a C++ compiler: `CXX`, or the first of c++, g++ and clang++ that is installed. For another
architecture it needs a cross compiler: `--target aarch64 --compiler aarch64-linux-gnu-g++ --folder FOLDER`.
"""

from __future__ import annotations

import argparse
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

_DOT_PRODUCT = "-march=armv8.2-a+dotprod"
_I8MM_BF16 = "-march=armv8.2-a+dotprod+i8mm+bf16"
_SVE256 = ("-march=armv8.2-a+dotprod+i8mm+bf16+sve", "-msve-vector-bits=256")

# The levels of each architecture, from the lowest to the highest: `mb_level` returns an index of its table. Other
# architectures have only `base`.
LEVELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "base": ("-O2",),  # for CPUs of before 2013: small rather than fast
        "avx2": _AVX2,
        "avx512": _AVX512,
        "avx512_vnni_bf16": _VNNI_BF16,
        "avx512_amx": (*_VNNI_BF16, "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
    },
    "aarch64": {
        "base": (),
        "neon_dotprod": (_DOT_PRODUCT,),
        "neon_i8mm_bf16": (_I8MM_BF16,),
        "sve256": _SVE256,
    },
}
# Names that systems give to these architectures.
_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}

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


def architecture(machine: str | None = None) -> str:
    """The name of an architecture in LEVELS, by the system's name for it; of this machine by default."""
    name = (machine or platform.machine()).lower()
    return _ARCHITECTURES.get(name, name)


def levels(target: str | None = None) -> dict[str, tuple[str, ...]]:
    """The levels of an architecture with their compiler flags; of this machine's by default."""
    return LEVELS.get(architecture(target), {"base": ()})


def compiler(environ: Mapping[str, str] = os.environ) -> list[str] | None:
    """The C++ compiler's command: CXX, or the first one found."""
    if chosen := shlex.split(environ.get("CXX", "")):
        return chosen if shutil.which(chosen[0]) else None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def ready(folder: Path = HERE, target: str | None = None) -> Outcome | None:
    """The result of an earlier build of the same sources, if every level is there; else None."""
    mark, paths = digest().encode(), [path_of(level, folder) for level in levels(target)]
    if all(path.is_file() and mark in path.read_bytes() for path in paths):
        return Outcome(tuple(levels(target)), "monoblock's native kernels are up to date")
    return None


def build(
    folder: Path = HERE,
    extra: tuple[str, ...] = (),
    seconds: float = 600,
    target: str | None = None,
    command: list[str] | None = None,
    openmp: bool = True,
) -> Outcome:
    """Compile every level of an architecture into `folder`. A level that fails to compile, or takes longer than
    `seconds`, is left out, and the result's message gives the reason.

    `extra`: further compiler flags. `target`: the architecture, this machine's by default. `command`: the compiler, by
    default that of `compiler()`. `openmp`: whether OpenMP is used where the compiler supports it.
    """
    outcome = _build(folder, extra, seconds, levels(target), command or compiler(), openmp)
    for level in {name for table in LEVELS.values() for name in table} - set(outcome.levels):
        path_of(level, folder).unlink(missing_ok=True)  # of an earlier build
    return outcome


def _build(
    folder: Path,
    more: tuple[str, ...],
    seconds: float,
    table: dict[str, tuple[str, ...]],
    command: list[str] | None,
    with_openmp: bool,
) -> Outcome:
    if command is None:
        named = os.environ.get("CXX")
        missing = f"CXX={named!r} was not found" if named else "no C++ compiler (g++ or clang++) was found"
        return Outcome(
            (),
            f"monoblock is installed without its native kernels: {missing}; PyTorch's kernels are used instead.",
        )
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
        threads = (_openmp(command, Path(scratch)) if with_openmp else ()) or ("-pthread", "-fopenmp-simd")
        flags = (*FLAGS, *(() if more else STRIP), f'-DMB_SOURCES="{digest()}"', *threads, *more)

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
                    wanted := [*reversed(table)],
                    pool.map(one, wanted, map(table.get, wanted)),
                    strict=True,
                )
            )
    built = tuple(level for level in table if not errors[level])
    if not built:
        return Outcome((), f"monoblock is installed without its native kernels: {_last(errors['base'])}")
    line = f"monoblock's native kernels were built by {command[0]}: {', '.join(built)}"
    failed = [f"{level} ({_last(text)})" for level, text in errors.items() if text]
    line = f"{line}; not {', '.join(failed)}" if failed else line
    return Outcome(
        built, line if "-fopenmp" in threads else f"{line}; without OpenMP: on threads of their own"
    )


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


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m monoblock.native.build", description="Compile the native kernels."
    )
    parser.add_argument("--target", default=architecture(), help="the architecture (default: this machine's)")
    parser.add_argument(
        "--compiler", help="the C++ compiler, with arguments if need be (default: CXX, or c++)"
    )
    parser.add_argument(
        "--folder", type=Path, default=HERE, help="the libraries' folder (default: the package)"
    )
    parser.add_argument("--no-openmp", action="store_true", help="use a thread pool in place of OpenMP")
    given = parser.parse_args(arguments)
    if (target := architecture(given.target)) != architecture():
        if target not in LEVELS:
            parser.error(f"--target {given.target}: expected {' or '.join(LEVELS)}")
        if not given.compiler or given.folder.resolve() == HERE:
            parser.error(f"--target {given.target} needs --compiler with a cross compiler, and a --folder")
    command = compiler({"CXX": given.compiler}) if given.compiler else None
    if given.compiler and command is None:
        parser.error(f"--compiler {given.compiler}: not found; install it, or give its path")
    if not given.folder.is_dir():
        parser.error(f"--folder {given.folder}: there is no such folder; make it first")
    outcome = build(given.folder, target=target, command=command, openmp=not given.no_openmp)
    print(outcome.line)
    return not outcome.levels


if __name__ == "__main__":
    sys.exit(main())
