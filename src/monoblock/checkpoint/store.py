"""Read checkpoint files: tensors by name, as views of memory-mapped files."""

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Iterator, KeysView, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from monoblock.checkpoint import pages
from monoblock.checkpoint.array_adapters import ArrayAdapter, Framework, adapter, import_torch
from monoblock.checkpoint.fingerprint import fingerprint
from monoblock.checkpoint.hdf5 import Hdf5
from monoblock.checkpoint.header import ITEM_BYTES, Header, TensorEntry, read_header
from monoblock.checkpoint.hub import Kind, WeightFiles
from monoblock.checkpoint.msgpack import read_msgpack
from monoblock.checkpoint.naming import Naming, RenamedShard, Shard, flax_name, tensorflow_name
from monoblock.checkpoint.pickles import plain_tensor, unpickled
from monoblock.checkpoint.save import parse_size, save_tensors
from monoblock.checkpoint.transaction import SAVE_ID
from monoblock.errors import CheckpointError
from monoblock.field_types import brief

__all__ = ["Store", "open_store", "parse_size", "save_tensors"]


_SLAB = 64 * 2**20  # bytes copied between releases of page-cache memory


class Store:
    """A checkpoint's tensors by name; no data is read before a tensor is used.

    A tensor is a view of a private memory map, and its pages are released when it is freed: copying a model out of a
    store takes the memory of the copy and of one tensor. In-place changes do not reach the file, and each call of
    `tensor` returns the stored values again. A .bin file is unpickled once, and every call returns the same object.

    Files of transformers 4's Flax and TensorFlow classes are presented under PyTorch's names and layouts. Tensors of
    .h5 files are copies; a tensor whose layout differs is a transposed view.
    """

    def __init__(self, shards: Sequence[Shard], owners: Mapping[str, Shard]):
        self._shards = shards
        self._owners = owners

    def keys(self) -> KeysView[str]:
        """The tensor names."""
        return self._owners.keys()

    def __contains__(self, name: object) -> bool:
        return name in self._owners

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._owners[name].shape(name)

    def dtype(self, name: str) -> str:
        """The safetensors name of a tensor's dtype: "F32", "BF16", "F8_E4M3", ..."""
        return self._owners[name].dtype(name)

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._owners[name].path

    def tensor(self, name: str) -> Any:
        """The tensor in its stored dtype, over the file's memory."""
        return self._owners[name].tensor(name)

    def concatenated(self, names: Sequence[str]) -> Any:
        """The tensors concatenated along axis 0 without a copy, over the files' memory; None where that is
        impossible."""
        shards = [self._owners[name] for name in names]
        if not all(isinstance(shard, _Mapped) for shard in shards):
            return None
        return _Mapped.concatenated(cast(list[_Mapped], shards), names)

    @property
    def outputs_first(self) -> bool:
        """Whether every matrix is returned as (outputs, inputs). Flax files do not distinguish the matrices that
        PyTorch files store transposed (Conv1D) from others."""
        return any(isinstance(shard, RenamedShard) and shard.naming is flax_name for shard in self._shards)

    @property
    def metadata(self) -> dict[str, str]:
        """The files' metadata (strings), merged."""
        return {key: value for shard in self._shards for key, value in shard.metadata.items()}


def open_store(files: WeightFiles, framework: Framework) -> Store:
    """The tensors of a checkpoint's files, for "pt" (PyTorch) or "np" (NumPy).

    `CheckpointError`: a file is missing, truncated, corrupt or no weight file, a pickle holds code, or the index lists
    a tensor that its shard lacks. `ImportError`: PyTorch (for "pt" and for .bin files) or h5py (for .h5 files) is not
    installed.
    """
    arrays = adapter(framework)
    shards: dict[Path, Shard] = {path: _OPENERS[files.kind](path, arrays) for path in files.paths}
    listed = files.weight_map or {}
    owners: dict[str, Shard] = {}
    for path, shard in shards.items():
        for name in shard.names():
            if name not in listed and name in owners:
                raise CheckpointError(f"tensor '{name}' is both in {owners[name].path} and in {path}")
            owners[name] = shard
    _check_save(files, shards)
    for name, path in listed.items():
        if isinstance(shards[path], RenamedShard):
            continue  # the index has the framework's own names; missing tensors are found when a model is loaded
        if name not in shards[path].names():
            raise CheckpointError(
                f"{path} lacks tensor '{name}', which the index says it holds: fetch the checkpoint again"
            )
        owners[name] = shards[path]
    return Store(list(shards.values()), owners)


def _check_save(files: WeightFiles, shards: Mapping[Path, Shard]) -> None:
    """CheckpointError for a mixture of files of several saves. Files of other libraries have no save id."""
    known = {path.name: shard.metadata.get(SAVE_ID) for path, shard in shards.items()}
    first: tuple[str, str] | None = ("their index", files.save_id) if files.save_id else None
    for name, save in known.items():
        if save is not None and first is not None and save != first[1]:
            raise _two_saves(next(iter(shards)).parent, name, first[0])
        first = first or ((name, save) if save is not None else None)
    for path, listed in files.fingerprints.items():
        if fingerprint(path) != listed:
            raise _two_saves(path.parent, path.name, "their index")


def _two_saves(folder: Path, name: str, first: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} holds weights of two saves: {name} does not match {first}; copy or save the model again"
    )


class _Mapped:
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
    def concatenated(shards: Sequence["_Mapped"], names: Sequence[str]) -> Any:
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


def _safetensors(path: Path, arrays: ArrayAdapter) -> Shard:
    """A safetensors file. If its metadata names transformers 4's Flax or TensorFlow format, names are translated."""
    shard = _Mapped(path, arrays, read_header)
    naming = _NAMINGS.get(shard.metadata.get("format", ""))
    return RenamedShard(shard, naming) if naming else shard


class _Pickle:
    """A PyTorch .bin file: memory-mapped if it is a zip archive (torch 1.6 and later), else read into memory."""

    def __init__(self, path: Path, arrays: ArrayAdapter):
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self._arrays = arrays
        self._tensors = _load_pickle(path)
        self._torch_arrays = adapter("pt")

    def names(self) -> KeysView[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        return self._torch_arrays.describe(name, self._tensors[name]).dtype

    def tensor(self, name: str) -> Any:
        tensor = self._tensors[name]
        if self._arrays is self._torch_arrays:
            return tensor
        return self._arrays.from_buffer(self._torch_arrays.raw(tensor), self.dtype(name), self.shape(name))


def _load_pickle(path: Path) -> dict[str, Any]:
    """The tensors of a .bin file: a state dict, or a training checkpoint with one under "state_dict"."""
    torch = import_torch(f"reading {path.name}")
    content = unpickled(path)
    if isinstance(content, dict):
        nested = cast(dict[object, Any], content).get("state_dict")
        content = cast(object, nested) if isinstance(nested, dict) else cast(object, content)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a dict of tensors")
    for name, value in cast(dict[object, Any], content).items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path}: entry {brief(name)} is a {type(value).__name__}; expected only tensors, by name"
            )
    return {name: plain_tensor(name, tensor, path) for name, tensor in cast(dict[str, Any], content).items()}


_NAMINGS: dict[str, Naming] = {"flax": flax_name, "tf": tensorflow_name}

_OPENERS: dict[Kind, Callable[[Path, ArrayAdapter], Shard]] = {
    "safetensors": _safetensors,
    "bin": _Pickle,
    "msgpack": lambda path, arrays: RenamedShard(_Mapped(path, arrays, read_msgpack), flax_name),
    "h5": lambda path, arrays: RenamedShard(Hdf5(path, arrays), tensorflow_name),
}
