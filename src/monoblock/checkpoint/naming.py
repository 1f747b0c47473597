"""The names and layouts of transformers 4's Flax and TensorFlow classes, as the hub's PyTorch names and layouts.

Both frameworks call a projection's matrix `kernel` and store it inputs x outputs; GPT-1's Conv1D alone is called
`weight` in TensorFlow's files and stored as PyTorch's is. What is left apart from that is spelling.
"""

import re
from collections.abc import Callable, KeysView, Mapping
from pathlib import Path
from typing import Any, Protocol

from monoblock.errors import CheckpointError

Naming = Callable[
    [str], tuple[str, bool]
]  # a framework's name -> the hub's, and whether a matrix is transposed

_FLAX_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_TENSORFLOW_LEAVES = {"kernel": "weight", "gamma": "weight", "beta": "bias", "embeddings": "weight"}


def flax_name(name: str) -> tuple[str, bool]:
    """`transformer.h.0.ln_1.scale` (or with slashes) -> `transformer.h.0.ln_1.weight`."""
    return _renamed(name.replace("/", "."), _FLAX_LEAVES)


def tensorflow_name(name: str) -> tuple[str, bool]:
    """`tf_open_aigpt_model/transformer/h_._0/ln_1/gamma:0` -> `transformer.h.0.ln_1.weight`.

    The outer model's name, which is its class's unless the user gave it one, is not in all files.
    """
    name = re.sub(r":\d+$", "", name)
    if name.startswith("tf") and "/" in name:
        name = name.partition("/")[2]
    return _renamed(name.replace("_._", ".").replace("/", "."), _TENSORFLOW_LEAVES)


def _renamed(name: str, leaves: Mapping[str, str]) -> tuple[str, bool]:
    stem, dot, leaf = name.rpartition(".")
    return stem + dot + leaves.get(leaf, leaf), leaf == "kernel"


class Shard(Protocol):
    """One weight file."""

    path: Path
    metadata: Mapping[str, str]

    def names(self) -> KeysView[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def tensor(self, name: str) -> Any: ...


class RenamedShard:
    """A file of a framework's own names and layouts, by the hub's names and in PyTorch's layouts."""

    def __init__(self, shard: Shard, naming: Naming):
        self.path = shard.path
        self.metadata = shard.metadata
        self.naming = naming
        self._shard = shard
        self._places: dict[str, tuple[str, bool]] = {}
        for own in shard.names():
            name, transposed = naming(own)
            if name in self._places:
                other = self._places[name][0]
                raise CheckpointError(f"{self.path} holds '{own}' and '{other}', which are one tensor here")
            self._places[name] = own, transposed

    def names(self) -> KeysView[str]:
        return self._places.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        own, transposed = self._places[name]
        shape = self._shard.shape(own)
        if transposed and len(shape) == 2:
            return shape[::-1]
        return shape[1:] if _is_row(name, shape) else shape

    def dtype(self, name: str) -> str:
        return self._shard.dtype(self._places[name][0])

    def tensor(self, name: str) -> Any:
        own, transposed = self._places[name]
        tensor = self._shard.tensor(own)
        if transposed and tensor.ndim == 2:
            return tensor.T
        return tensor[0] if _is_row(name, tuple(tensor.shape)) else tensor


def _is_row(name: str, shape: tuple[int, ...]) -> bool:
    """Whether this is a bias of TensorFlow's Conv1D, which is stored as a matrix of one row."""
    return name.endswith("bias") and len(shape) == 2 and shape[0] == 1
