"""Read TensorFlow .h5 weight files of transformers 4, through h5py."""

import importlib
import math
from collections.abc import KeysView, Mapping
from pathlib import Path
from typing import Any

from monoblock.checkpoint.array_adapters import SAFETENSORS_DTYPES, ArrayAdapter, adapter
from monoblock.checkpoint.header import check_weight_file
from monoblock.errors import CheckpointError

# Limit on the decompressed size: this many times the file's size (weights hardly compress), plus this many bytes.
_MAX_RATIO, _SMALL = 64, 2**20


class Hdf5:
    """One .h5 file; a tensor is read each time it is requested.

    The file of a whole model has a group per layer, with that layer's weights under their full names; a shard has
    only weights, mostly without the outer model's name. Here that name is removed from all of them.
    """

    def __init__(self, path: Path, arrays: ArrayAdapter):
        self._bytes, self._unpacked = check_weight_file(path), 0
        h5py = _import_h5py(path)
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self._arrays = arrays
        self._datasets: dict[str, Any] = {}
        try:
            self._file: Any = h5py.File(path, "r")
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read as HDF5 ({_line(error)}): fetch it again"
            ) from error
        try:
            self._find()
        except BaseException:
            self._file.close()  # HDF5 refuses to write to an open file
            raise

    def _find(self) -> None:
        """Index all datasets of the file itself; soft and external links are not followed."""
        try:
            self._file.visititems(self._add)
        except CheckpointError:
            raise
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            # ValueError: a name that is not UTF-8, or a floating-point type that NumPy lacks.
            raise CheckpointError(f"{self.path} is damaged ({_line(error)}): fetch it again") from error
        if not self._datasets:
            raise CheckpointError(f"{self.path} is an HDF5 file without weights: fetch it again")

    def _add(self, key: str | bytes, new: Any) -> None:
        if not hasattr(new, "chunks"):
            return  # a group or a named type
        if not isinstance(key, str):
            raise CheckpointError(f"{self.path} is damaged (a name is not UTF-8): fetch it again")
        name = self._without_model(key)
        if new.external or new.is_virtual:
            raise CheckpointError(f"{self.path} is refused: the data of '{name}' are in other files")
        if new.shape is None or new.dtype.name not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"{self.path}: '{name}' has dtype {new.dtype}, which is not supported")
        self._check_stored(name, new)
        known = self._datasets.setdefault(name, new)  # a tensor that two layers share is stored in both
        if (known.shape, known.dtype) != (new.shape, new.dtype):
            raise CheckpointError(f"{self.path} holds '{name}' twice, and with different shapes or dtypes")

    def _check_stored(self, name: str, new: Any) -> None:
        """CheckpointError for unallocated data, which HDF5 would fill in at any size, or for excessive compression."""
        size, stored = math.prod(new.shape) * new.dtype.itemsize, new.id.get_storage_size()
        chunk = math.prod(new.chunks or ()) * new.dtype.itemsize
        if new.id.get_create_plist().get_nfilters():
            self._unpacked += size
            fits = stored > 0 and self._unpacked <= _MAX_RATIO * self._bytes + _SMALL
        else:
            fits = stored >= size
        if not fits or chunk > size + _SMALL:
            raise CheckpointError(
                f"{self.path} is refused: '{name}' has {size:,} bytes, of which {stored:,} are stored: is it truncated?"
            )

    def _without_model(self, key: str) -> str:
        """`group/model/group/layer/kernel:0` -> `group/layer/kernel:0`; keys of shards are unchanged."""
        group, _, name = key.partition("/")
        if not any(str(attribute).startswith("weight_names") for attribute in self._file[group].attrs):
            return key
        return name.partition("/")[2] or name

    def names(self) -> KeysView[str]:
        return self._datasets.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._datasets[name].shape

    def dtype(self, name: str) -> str:
        return SAFETENSORS_DTYPES[self._datasets[name].dtype.name]

    def tensor(self, name: str) -> Any:
        try:
            array = self._datasets[name][()]
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} is damaged at '{name}' ({_line(error)}): fetch it again"
            ) from error
        return self._arrays.from_buffer(adapter("np").raw(array), self.dtype(name), self.shape(name))


def is_weights(path: Path) -> bool:
    """Whether an .h5 file holds the weights of layers (`save_weights`) rather than a whole Keras model."""
    h5py = _import_h5py(path)
    with h5py.File(path, "r") as file:
        return "layer_names" in file.attrs


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _import_h5py(path: Path) -> Any:
    try:
        return importlib.import_module("h5py")
    except ImportError as error:
        raise ImportError(f"reading {path.name} needs h5py: pip install h5py") from error
