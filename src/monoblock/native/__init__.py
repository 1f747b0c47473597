"""Loads the native CPU library for the highest instruction set that the machine supports. Imports no framework.

The library is opened at the first use. The environment variable `MONOBLOCK_NATIVE` limits the choice: `0` disables the
library; the name of a level of this architecture (`build.LEVELS`) is the highest level that is used.
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

FORMATS = abi.FORMATS
VARIABLE = "MONOBLOCK_NATIVE"
# Levels with dot products of bfloat16, and of 8-bit integers: there, inputs are rounded to these for some products.
BF16_DOT_PRODUCTS = ("avx512_vnni_bf16", "avx512_amx", "neon_i8mm_bf16", "sve256")
INT8_DOT_PRODUCTS = (*BF16_DOT_PRODUCTS, "neon_dotprod")
OWN_THREADS = "built without OpenMP: on threads of its own"


def library() -> Any:
    """The opened library (a `ctypes.CDLL`); None if there is none, so that the framework's kernels are used."""
    return _opened()[0]


def has_openmp(library: Any) -> bool:
    """Whether an opened library uses OpenMP, and so PyTorch's threads; else it has threads of its own."""
    return bool(library.mb_openmp())


def level() -> str | None:
    """The instruction set in use, or None."""
    return _opened()[1]


def has_int8_gemm() -> bool:
    """Whether products of quantised weights with many rows use 8-bit inputs (VNNI, AMX, or ARM's dot products)."""
    return level() in INT8_DOT_PRODUCTS


def has_bf16_gemm(inputs: int) -> bool:
    """Whether the library has a GEMM (AVX-512 BF16, AMX or ARM's BF16) for bfloat16 products with many rows of `inputs`
    columns."""
    return has_amx() or (level() in BF16_DOT_PRODUCTS and inputs % 2 == 0 and not only_torch_has_amx())


def has_amx() -> bool:
    """Whether the library's products use AMX."""
    return level() == "avx512_amx"


def only_torch_has_amx() -> bool:
    """Whether PyTorch's bfloat16 products use AMX, but the library does not."""
    found = library()
    return found is not None and not has_amx() and bool(found.mb_amx())


def status() -> str:
    """The level in use, or why there is none, for messages."""
    return _opened()[2]


@functools.cache
def _opened() -> tuple[Any, str | None, str]:
    return choose(os.environ.get(VARIABLE, ""))


def choose(chosen: str) -> tuple[Any, str | None, str]:
    """The library, its level and the status for a value of `MONOBLOCK_NATIVE`."""
    # Here, so that `build` can be run as a script without being imported before.
    from monoblock.native import build
    from monoblock.native.tuning import apply_setting

    chosen = chosen.strip().lower()
    if chosen in ("0", "off", "no", "false"):
        return None, None, f"off: {VARIABLE} is {chosen}"
    names = list(build.levels())
    if chosen and chosen not in (*names, "1", "on"):
        return None, None, f"off: {VARIABLE} is {chosen!r}, not one of 0, {', '.join(names)}"
    if not build.path_of("base").exists():
        return (
            None,
            None,
            "none: not built; build it by python -m monoblock.native.build (needs a C++ compiler)",
        )
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
                "none: built from other sources; rebuild it by python -m monoblock.native.build",
            )
        abi.bind(found, abi.SIGNATURES)
        if difference := abi.mismatch(found):
            return None, None, f"none: {difference}; the versions differ: reinstall monoblock"
    except (OSError, AttributeError) as error:
        return None, None, f"none: {error}"
    apply_setting(found)
    status = best if best == names[highest] or chosen in names else f"{best}; {names[highest]} was not built"
    return found, best, status if has_openmp(found) else f"{status}; {OWN_THREADS}"


def _open_openmp_runtime() -> None:
    """Open the OpenMP runtime of an installed PyTorch before the kernels load one by name.

    Both then share one thread pool, in either order of loading, and the kernels load on systems without libgomp.
    """
    if sys.platform != "linux":
        return
    try:
        spec = importlib.util.find_spec("torch")
    except ValueError:  # a stand-in for PyTorch in sys.modules, which names no file
        return
    if spec is not None and spec.origin:
        for path in sorted(Path(spec.origin).parent.glob("lib/libgomp*.so*")):
            with suppress(OSError):
                ctypes.CDLL(str(path))
