"""Atomic exchange of two paths: renameat2(RENAME_EXCHANGE) on Linux, renamex_np(RENAME_SWAP) on macOS."""

import ctypes
import errno
import functools
import os
import platform
import sys
from pathlib import Path
from typing import Any

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # Linux
_RENAME_SWAP = 2  # macOS
# System call number of renameat2, for C libraries without a wrapper.
_SYSCALL = {"x86_64": 316, "aarch64": 276, "riscv64": 276}


def exchange(first: Path, second: Path) -> None:
    """Swap two paths atomically. OSError, with nothing changed, where that is not possible: on other systems, old
    kernels, file systems without support, or across file systems."""
    call = _call()
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(os.fsencode(first), os.fsencode(second)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(first), None, str(second))


@functools.cache
def _call() -> Any:
    """A function of two paths (bytes) that returns 0 on success; None if the system has none."""
    if sys.platform not in ("linux", "darwin"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    text, number, flags = ctypes.c_char_p, ctypes.c_int, ctypes.c_uint
    if sys.platform == "darwin":
        swap = getattr(libc, "renamex_np", None)
        if swap is None:
            return None
        swap.argtypes = (text, text, flags)
        return functools.partial(_swap, swap)
    types = (number, text, number, text, flags)
    rename = getattr(libc, "renameat2", None)
    if rename is not None:
        rename.argtypes = types
        return functools.partial(_renameat2, rename)
    code = _SYSCALL.get(platform.machine())
    if code is None:
        return None
    libc.syscall.argtypes = (ctypes.c_long, *types)
    libc.syscall.restype = ctypes.c_long
    return functools.partial(_renameat2, functools.partial(libc.syscall, code))


def _swap(call: Any, first: bytes, second: bytes) -> int:
    return call(first, second, _RENAME_SWAP)


def _renameat2(call: Any, first: bytes, second: bytes) -> int:
    return call(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE)
