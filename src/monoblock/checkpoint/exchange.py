"""Two folders that change places in one step, where the operating system can do that."""

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
# The number of renameat2 where the C library has no function of that name; arm64's is that of all newer machines.
_SYSCALL = {"x86_64": 316, "aarch64": 276, "riscv64": 276}


def exchange(first: Path, second: Path) -> None:
    """Give each of two paths what the other one names. OSError, and nothing has changed, where that cannot be done:
    another system than Linux or macOS, an old one, a file system without it, or two file systems."""
    call = _call()
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(os.fsencode(first), os.fsencode(second)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(first), None, str(second))


@functools.cache
def _call() -> Any:
    """The system's call for two paths as bytes, 0 if it was done; None without one."""
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
