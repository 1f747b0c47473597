"""Read checkpoint files: tensors by name, as views of memory-mapped files."""

from collections.abc import Callable, Iterator, KeysView, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from monoblock.checkpoint.array_adapters import ArrayAdapter, Framework, adapter, import_torch
from monoblock.checkpoint.fingerprint import fingerprint
from monoblock.checkpoint.hdf5 import Hdf5
from monoblock.checkpoint.header import read_header
from monoblock.checkpoint.hub import WeightFiles
from monoblock.checkpoint.mapped import Mapped
from monoblock.checkpoint.msgpack import read_msgpack
from monoblock.checkpoint.naming import Naming, RenamedShard, Shard, flax_name, tensorflow_name
from monoblock.checkpoint.pickles import plain_tensor, unpickled
from monoblock.checkpoint.save import parse_size, save_tensors
from monoblock.checkpoint.transaction import SAVE_ID
from monoblock.errors import CheckpointError
from monoblock.field_types import brief

__all__ = ["Store", "open_store", "parse_size", "save_tensors"]


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
        if not all(isinstance(shard, Mapped) for shard in shards):
            return None
        return Mapped.concatenated(cast(list[Mapped], shards), names)

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
    if files.kind == "gguf":
        from monoblock.checkpoint.gguf.tensors import open_gguf  # imports NumPy

        whole = open_gguf(files.paths, arrays)
        return Store([whole], dict.fromkeys(whole.names(), whole))
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


def _safetensors(path: Path, arrays: ArrayAdapter) -> Shard:
    """A safetensors file. If its metadata names transformers 4's Flax or TensorFlow format, names are translated."""
    shard = Mapped(path, arrays, read_header)
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

_OPENERS: dict[str, Callable[[Path, ArrayAdapter], Shard]] = {
    "safetensors": _safetensors,
    "bin": _Pickle,
    "msgpack": lambda path, arrays: RenamedShard(Mapped(path, arrays, read_msgpack), flax_name),
    "h5": lambda path, arrays: RenamedShard(Hdf5(path, arrays), tensorflow_name),
}
