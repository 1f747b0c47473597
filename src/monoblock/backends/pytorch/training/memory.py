"""How the C library keeps the memory of tensors that were freed."""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # malloc.h of glibc
LARGE = 8 << 20  # bytes of a block from which it is returned to the system when it is freed


def return_large_blocks() -> None:
    """Let glibc return the memory of every large tensor to the system.

    By default it raises this limit to 32 MB, and with gradient checkpointing the kept inputs of the layers are
    allocated in gaps that larger tensors left: the heap grows with every layer. New pages cost time: a step of QLoRA on
    1.1 billion weights takes half as long again and half the memory. Other C libraries have no such limit.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE)
