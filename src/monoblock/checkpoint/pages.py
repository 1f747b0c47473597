"""Memory by pages, on Linux: tensors that lie apart in files, side by side without a copy."""

import ctypes
import functools
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LEAST = 1 << 20  # bytes below which a copy is as quick
_FIXED = 0x10  # MAP_FIXED, as on all of Linux's machines but a few that nobody runs this on
_FAILED = ctypes.c_void_p(-1).value


@dataclass(frozen=True)
class FileRange:
    """Bytes [begin, end) of an open file, by its descriptor."""

    file: int
    begin: int
    end: int


@functools.cache
def _libc() -> Any:
    """The C library with the calls that are used here, or None where they are not Linux's."""
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


def map_contiguous(pieces: Sequence[FileRange]) -> Any:
    """The pieces one after the other as one buffer over the files' own pages, or None where they do not fit.

    They fit if each begins as many bytes into a page as the one before it ends: then pages of files can follow each
    other in memory, and only the page that two pieces share is copied. None but the last may be less than a page. The
    buffer may be written to; the files do not change. Its pages go back to the system with it.
    """
    page, total = mmap.PAGESIZE, sum(piece.end - piece.begin for piece in pieces)
    libc, shift = _libc(), pieces[0].begin % mmap.PAGESIZE
    starts: list[int] = []
    at = shift
    for piece in pieces:
        if piece.begin % page != at % page or (piece is not pieces[-1] and piece.end - piece.begin < page):
            return None
        starts.append(at)
        at += piece.end - piece.begin
    if libc is None or total < LEAST:
        return None
    length = -(-at // page) * page
    access, private = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE
    base = libc.mmap(None, length, access, private | mmap.MAP_ANONYMOUS, -1, 0)
    if base == _FAILED:
        return None
    buffer = (ctypes.c_char * total).from_address(base + shift)
    weakref.finalize(buffer, libc.munmap, base, length).atexit = False
    for i, (piece, start) in enumerate(zip(pieces, starts, strict=True)):
        inside = start % page
        size = piece.end - piece.begin + inside
        place = base + start - inside
        if libc.mmap(place, size, access, private | _FIXED, piece.file, piece.begin - inside) != place:
            return None
        if i and inside:
            # The page began with the end of the piece before.
            before = os.pread(pieces[i - 1].file, inside, pieces[i - 1].end - inside)
            ctypes.memmove(place, before, inside)
    return buffer
