"""TensorFlow's .h5 files, as transformers 4 wrote them, read with h5py."""

import importlib
import math
from collections.abc import KeysView, Mapping
from pathlib import Path
from typing import Any

from monoblock.checkpoint.array_adapters import HUB_NAMES, Adapter, adapter
from monoblock.checkpoint.header import check_weight_file
from monoblock.errors import CheckpointError

# How often the file's bytes its compressed numbers may have (weights hardly shrink), and bytes that are always fine.
_PACKED, _SMALL = 64, 2**20


class Hdf5:
    """One .h5 file; a tensor is read from it whenever it is asked for.

    A whole model's file has a group for each part of the model, and in it that part's weights by their full names;
    a shard has weights only, mostly without the outer model's name. Here all are without it.
    """

    def __init__(self, path: Path, side: Adapter):
        self._bytes, self._unpacked = check_weight_file(path), 0
        h5py = _import_h5py(path)
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self._side = side
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
            self._file.close()  # HDF5 refuses to write to what is open
            raise

    def _find(self) -> None:
        """Note all weights: what the file itself holds, neither by soft links nor by those to other files."""
        try:
            self._file.visititems(self._add)
        except CheckpointError:
            raise
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            # ValueError: a name that is no UTF-8 text, a floating-point type that NumPy has none for.
            raise CheckpointError(f"{self.path} is damaged ({_line(error)}): fetch it again") from error
        if not self._datasets:
            raise CheckpointError(f"{self.path} is an HDF5 file without weights: fetch it again")

    def _add(self, key: str | bytes, new: Any) -> None:
        if not hasattr(new, "chunks"):
            return  # a group, or a named type, which holds no numbers
        if not isinstance(key, str):
            raise CheckpointError(f"{self.path} is damaged (a name is no text): fetch it again")
        name = self._without_model(key)
        if new.external or new.is_virtual:
            raise CheckpointError(f"{self.path} is refused: '{name}' has its numbers in other files")
        if new.shape is None or new.dtype.name not in HUB_NAMES:
            raise CheckpointError(f"{self.path}: '{name}' has dtype {new.dtype}, which is no tensor's")
        self._check_stored(name, new)
        known = self._datasets.setdefault(name, new)  # what two parts of a model share is stored in both
        if (known.shape, known.dtype) != (new.shape, new.dtype):
            raise CheckpointError(f"{self.path} holds '{name}' twice, and with different shapes or dtypes")

    def _check_stored(self, name: str, new: Any) -> None:
        """CheckpointError for numbers that are not stored, which HDF5 makes up in any size, or packed too well."""
        size, stored = math.prod(new.shape) * new.dtype.itemsize, new.id.get_storage_size()
        chunk = math.prod(new.chunks or ()) * new.dtype.itemsize
        if new.id.get_create_plist().get_nfilters():
            self._unpacked += size
            fits = stored > 0 and self._unpacked <= _PACKED * self._bytes + _SMALL
        else:
            fits = stored >= size
        if not fits or chunk > size + _SMALL:
            raise CheckpointError(
                f"{self.path} is refused: '{name}' has {size:,} bytes, of which {stored:,} are stored: is it cut off?"
            )

    def _without_model(self, key: str) -> str:
        """`part/model/part/layer/kernel:0` -> `part/layer/kernel:0`; a shard's key stays as it is."""
        part, _, name = key.partition("/")
        if not any(str(attribute).startswith("weight_names") for attribute in self._file[part].attrs):
            return key
        return name.partition("/")[2] or name

    def names(self) -> KeysView[str]:
        return self._datasets.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._datasets[name].shape

    def dtype(self, name: str) -> str:
        return HUB_NAMES[self._datasets[name].dtype.name]

    def tensor(self, name: str) -> Any:
        try:
            array = self._datasets[name][()]
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} is damaged at '{name}' ({_line(error)}): fetch it again"
            ) from error
        return self._side.from_buffer(adapter("np").raw(array), self.dtype(name), self.shape(name))


def is_weights(path: Path) -> bool:
    """Whether an .h5 file holds the weights of layers, and not a whole Keras model."""
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
