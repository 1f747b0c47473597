"""The native kernels: which of them this machine can run, and how to call them. Imports no framework.

A library is opened when it is first asked for. `MONOBLOCK_NATIVE` chooses: `0` for none, or the name of a level
(`base`, `avx2`, `avx512`, `avx512_vnni_bf16`) for no higher one; by default the highest that the machine has.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from monoblock.native import abi

FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "lossless": 4}
VARIABLE = "MONOBLOCK_NATIVE"
SERIAL = "built without OpenMP, so it has one thread"


def library() -> Any:
    """The opened library (a `ctypes.CDLL`), or None: then the work is the framework's."""
    return _opened()[0]


def preferred(threads: int) -> Any:
    """The library where it is the better choice for a framework that has so many threads; else None.

    A build without OpenMP runs on one thread, so it is preferred to no more than one thread of the framework's. For
    work that the framework has no kernels for, `library` is asked instead.
    """
    found = library()
    return found if found is not None and (threads <= 1 or has_openmp(found)) else None


@functools.cache
def has_openmp(library: Any) -> bool:
    """Whether an opened library can use several threads."""
    return bool(library.mb_openmp())


def level() -> str | None:
    """The instruction set in use, or None."""
    return _opened()[1]


def has_int8_gemm() -> bool:
    """Whether many rows of inputs are multiplied with packed weights by whole-number products (AVX-512 VNNI)."""
    return level() == "avx512_vnni_bf16"


def has_bf16_gemm(inputs: int) -> bool:
    """Whether many rows of so many bfloat16 inputs are multiplied in pairs (AVX-512 BF16; AMX is PyTorch's)."""
    return level() == "avx512_vnni_bf16" and inputs % 2 == 0 and not library().mb_amx()


def status() -> str:
    """One sentence: which kernels are in use, or why there are none."""
    return _opened()[2]


@functools.cache
def _opened() -> tuple[Any, str | None, str]:
    return choose(os.environ.get(VARIABLE, ""))


def choose(chosen: str) -> tuple[Any, str | None, str]:
    """The library, its level and the status for a value of `MONOBLOCK_NATIVE`."""
    from monoblock.native import (
        build,
    )  # here, so that it can be run as a script without being imported before

    chosen = chosen.strip().lower()
    if chosen in ("0", "off", "no", "false"):
        return None, None, f"off: {VARIABLE} is {chosen}"
    names = list(build.LEVELS)
    if chosen and chosen not in (*names, "1", "on"):
        return None, None, f"off: {VARIABLE} is {chosen!r}, which is none of 0, {', '.join(names)}"
    if not build.path_of("base").exists():
        return None, None, "none: not built; python -m monoblock.native.build does, with a C++ compiler"
    _open_openmp_runtime()
    try:
        highest = ctypes.CDLL(str(build.path_of("base"))).mb_level()
        limit = min(highest, names.index(chosen)) if chosen in names else highest
        best = next(name for name in reversed(names[: limit + 1]) if build.path_of(name).exists())
        found = ctypes.CDLL(str(build.path_of(best)))
        abi.bind(found, ("mb_sources",))
        if found.mb_sources().decode() != build.digest():
            return (
                None,
                None,
                "none: built from other sources; python -m monoblock.native.build builds it again",
            )
        abi.bind(found, abi.SIGNATURES)
        if difference := abi.mismatch(found):
            return None, None, f"none: {difference}; they are of different versions: install monoblock again"
    except (OSError, AttributeError) as error:
        return None, None, f"none: {error}"
    said = best if best == names[highest] or chosen in names else f"{best}; {names[highest]} was not built"
    return found, best, said if has_openmp(found) else f"{said}; {SERIAL}"


def _open_openmp_runtime() -> None:
    """Open the OpenMP runtime of an installed PyTorch before the kernels look for one by its name.

    Then both have one thread pool whichever is opened first, and the kernels open where the system has no libgomp.
    """
    spec = importlib.util.find_spec("torch") if sys.platform == "linux" else None
    if spec is not None and spec.origin:
        for path in sorted(Path(spec.origin).parent.glob("lib/libgomp*.so*")):
            with suppress(OSError):
                ctypes.CDLL(str(path))
