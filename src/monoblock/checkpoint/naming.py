"""Flax and TensorFlow checkpoints of transformers 4 under PyTorch's parameter names and layouts.

Both frameworks call a projection's matrix `kernel` and store it as (inputs, outputs). The exception is GPT-1's Conv1D
in TensorFlow files: it is called `weight` and stored as PyTorch stores it. All else is a change of names.
"""

import re
from collections.abc import Callable, KeysView, Mapping
from pathlib import Path
from typing import Any, Protocol

from monoblock.errors import CheckpointError

# A framework's name -> PyTorch's name, and whether a matrix is stored transposed.
Naming = Callable[[str], tuple[str, bool]]

_FLAX_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_TENSORFLOW_LEAVES = {"kernel": "weight", "gamma": "weight", "beta": "bias", "embeddings": "weight"}


def flax_name(name: str) -> tuple[str, bool]:
    """`transformer.h.0.ln_1.scale` (or with slashes) -> `transformer.h.0.ln_1.weight`."""
    return _renamed(name.replace("/", "."), _FLAX_LEAVES)


def tensorflow_name(name: str) -> tuple[str, bool]:
    """`tf_open_aigpt_model/transformer/h_._0/ln_1/gamma:0` -> `transformer.h.0.ln_1.weight`.

    Some files lack the outer model's name, which defaults to its class name in snake case.
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
    """A Flax or TensorFlow weight file, presented under PyTorch's names and layouts."""

    def __init__(self, shard: Shard, naming: Naming):
        self.path = shard.path
        self.metadata = shard.metadata
        self.naming = naming
        self._shard = shard
        self._stored: dict[str, tuple[str, bool]] = {}
        for own in shard.names():
            name, transposed = naming(own)
            if name in self._stored:
                other = self._stored[name][0]
                raise CheckpointError(
                    f"{self.path} holds '{own}' and '{other}', which are the same parameter"
                )
            self._stored[name] = own, transposed

    def names(self) -> KeysView[str]:
        return self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        own, transposed = self._stored[name]
        shape = self._shard.shape(own)
        if transposed and len(shape) == 2:
            return shape[::-1]
        return shape[1:] if _is_row(name, shape) else shape

    def dtype(self, name: str) -> str:
        return self._shard.dtype(self._stored[name][0])

    def tensor(self, name: str) -> Any:
        own, transposed = self._stored[name]
        tensor = self._shard.tensor(own)
        if transposed and tensor.ndim == 2:
            return tensor.T
        return tensor[0] if _is_row(name, tuple(tensor.shape)) else tensor


def _is_row(name: str, shape: tuple[int, ...]) -> bool:
    """Whether this is the bias of TensorFlow's Conv1D, which is stored as (1, outputs)."""
    return name.endswith("bias") and len(shape) == 2 and shape[0] == 1
