"""Zero-copy concatenation of file ranges by memory mapping (Linux): separate ranges at consecutive addresses."""

import ctypes
import functools
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MIN_BYTES = 1 << 20  # below this a copy is as fast
_FIXED = 0x10  # MAP_FIXED on x86-64, AArch64 and most other Linux architectures
_FAILED = ctypes.c_void_p(-1).value


@dataclass(frozen=True)
class FileRange:
    """Bytes [begin, end) of an open file; `file` is its descriptor."""

    file: int
    begin: int
    end: int


@functools.cache
def _libc() -> Any:
    """The C library with `mmap` and `munmap`; None on systems other than Linux."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_size_t
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        *(ctypes.c_void_p, size, ctypes.c_int, ctypes.c_int),
        *(ctypes.c_int, ctypes.c_longlong),
    )
    libc.munmap.argtypes = (ctypes.c_void_p, size)
    return libc


def map_contiguous(ranges: Sequence[FileRange]) -> Any:
    """The ranges as one contiguous buffer over the files' pages; None where alignment does not allow that.

    Each range must begin at the page offset at which the one before it ends, and all but the last must span a page at
    least. Then the files' pages are mapped at consecutive addresses, and only a page that two ranges share is copied.
    The mapping is private: writes do not change the files. The pages are unmapped when the buffer is freed.
    """
    page, total = mmap.PAGESIZE, sum(span.end - span.begin for span in ranges)
    libc, shift = _libc(), ranges[0].begin % mmap.PAGESIZE
    starts: list[int] = []
    at = shift
    for span in ranges:
        if span.begin % page != at % page or (span is not ranges[-1] and span.end - span.begin < page):
            return None
        starts.append(at)
        at += span.end - span.begin
    if libc is None or total < MIN_BYTES:
        return None
    length = -(-at // page) * page
    access, private = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE
    base = libc.mmap(None, length, access, private | mmap.MAP_ANONYMOUS, -1, 0)
    if base == _FAILED:
        return None
    buffer = (ctypes.c_char * total).from_address(base + shift)
    weakref.finalize(buffer, libc.munmap, base, length).atexit = False
    for i, (span, start) in enumerate(zip(ranges, starts, strict=True)):
        inside = start % page
        size = span.end - span.begin + inside
        address = base + start - inside
        if libc.mmap(address, size, access, private | _FIXED, span.file, span.begin - inside) != address:
            return None
        if i and inside:
            # The first bytes of this page are the end of the previous range.
            before = os.pread(ranges[i - 1].file, inside, ranges[i - 1].end - inside)
            ctypes.memmove(address, before, inside)
    return buffer
