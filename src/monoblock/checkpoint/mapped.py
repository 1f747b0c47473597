"""A weight file in a private memory map: tensors as views of it, whose pages are released when they are freed."""

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, KeysView, Sequence
from pathlib import Path
from typing import Any

from monoblock.checkpoint import pages
from monoblock.checkpoint.array_adapters import ArrayAdapter
from monoblock.checkpoint.header import ITEM_BYTES, Header, TensorEntry
from monoblock.errors import CheckpointError

_SLAB = 64 * 2**20  # bytes copied between releases of page-cache memory


class Mapped:
    """A private memory map of a file whose tensors' offsets are known. It holds the file that was opened: a later file
    of the same name belongs to another save."""

    def __init__(self, path: Path, arrays: ArrayAdapter, read: Callable[[Path], Header]):
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError:
            read(path)  # raises an error that explains
            raise
        weakref.finalize(self, os.close, self._file).atexit = False
        header = read(path)
        if not os.path.samestat(path.stat(), os.fstat(self._file)):
            raise CheckpointError(f"{path} was replaced while it was read: load again")
        self.metadata = header.metadata
        self._entries = header.entries
        self._arrays = arrays
        self._map = self._open()
        self._given: set[str] = set()  # names whose range of the current map was handed out

    def _open(self) -> mmap.mmap:
        return mmap.mmap(self._file, 0, access=mmap.ACCESS_COPY)

    def names(self) -> KeysView[str]:
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        return self._entries[name].dtype

    def tensor(self, name: str) -> Any:
        entry = self._entries[name]
        # Frameworks need aligned, contiguous elements.
        direct = not entry.rest and not entry.begin % ITEM_BYTES[entry.dtype]
        buffer = self._buffer(name, entry) if direct else self._copied(entry)
        return self._arrays.from_buffer(buffer, entry.dtype, entry.shape)

    @staticmethod
    def concatenated(shards: Sequence["Mapped"], names: Sequence[str]) -> Any:
        """See `Store.concatenated`."""
        entries = [shard._entries[name] for shard, name in zip(shards, names, strict=True)]
        first = entries[0]
        alike = all(e.dtype == first.dtype and e.shape[1:] == first.shape[1:] and not e.rest for e in entries)
        if not alike or not first.shape or first.begin % ITEM_BYTES[first.dtype]:
            return None
        ranges = [pages.FileRange(s._file, e.begin, e.end) for s, e in zip(shards, entries, strict=True)]
        if (buffer := pages.map_contiguous(ranges)) is None:
            return None
        shape = (sum(entry.shape[0] for entry in entries), *first.shape[1:])
        return shards[0]._arrays.from_buffer(buffer, first.dtype, shape)

    def _copied(self, entry: TensorEntry) -> bytearray:
        """A copy of the entry's bytes; the mapped pages are released while copying."""
        ranges = ((entry.begin, entry.end), *entry.rest)
        copy = bytearray(sum(end - begin for begin, end in ranges))
        at = 0
        for begin, end in ranges:
            for start in range(begin, end, _SLAB):
                stop = min(start + _SLAB, end)
                copy[at : at + stop - start] = memoryview(self._map)[start:stop]
                at += stop - start
                _release(self._map, *_inner_pages(start, stop))
        return copy

    def _buffer(self, name: str, entry: TensorEntry) -> ctypes.Array[ctypes.c_char]:
        """The entry's range of the map, as an object that releases the pages it alone covers when it is freed.

        Each range of a map is handed out once. A second tensor of the same name gets a new map: it must not see
        changes made in the first one, nor lose its own when the first one's pages are released.
        """
        if name in self._given:
            self._map = self._open()
            self._given.clear()
        self._given.add(name)
        buffer = (ctypes.c_char * (entry.end - entry.begin)).from_buffer(self._map, entry.begin)
        pages = _inner_pages(entry.begin, entry.end)
        weakref.finalize(buffer, _release, self._map, *pages).atexit = False
        return buffer


def _inner_pages(begin: int, end: int) -> tuple[int, int]:
    """Offset and length of the pages that lie entirely within [begin, end)."""
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    return first, end // mmap.PAGESIZE * mmap.PAGESIZE - first


def _release(pages: mmap.mmap, begin: int, length: int) -> None:
    if length > 0 and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        pages.madvise(mmap.MADV_DONTNEED, begin, length)
