"""Weights between files and Flax's tree of parameters, one tensor at a time.

The tree is the canonical one, nested at the dots: `blocks.0.attn.qkv.weight` is
`params["blocks"]["0"]["attn"]["qkv"]["kernel"]`, transposed to inputs x outputs as Linen's layers have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from monoblock.checkpoint.casts import FLOATS, dtype_of
from monoblock.checkpoint.fitting import Report, fitted
from monoblock.checkpoint.keymap import KeyMap
from monoblock.checkpoint.weights import Tensors
from monoblock.errors import CheckpointError

Tree = dict[str, Any]
Place = tuple[str, ...]

TABLES = ("embed", "pos_embed", "rel_bias")  # of which the weight is called `embedding`, and lies as it is


def place(canonical: str, ndim: int) -> Place:
    """Where a canonical parameter is in the tree."""
    *modules, leaf = canonical.split(".")
    if leaf == "weight":
        leaf = "embedding" if modules[-1] in TABLES else "kernel" if ndim == 2 else "scale"
    return (*modules, leaf)


def transposed(path: Place) -> bool:
    """Whether the tree has the other axis first."""
    return path[-1] == "kernel"


def leaf_shape(path: Place, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a leaf whose canonical parameter has that shape."""
    return shape[::-1] if transposed(path) else shape


def nested(leaves: Mapping[Place, Any]) -> Tree:
    """A tree of dicts from leaves by their paths."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def flat(tree: Mapping[str, Any], above: Place = ()) -> dict[Place, Any]:
    """The leaves of a tree of dicts by their paths."""
    found: dict[Place, Any] = {}
    for name, node in tree.items():
        path = (*above, str(name))
        found |= flat(node, path) if isinstance(node, Mapping) else {path: node}
    return found


def from_canonical(parameters: Mapping[str, Any]) -> Tree:
    """Flax's tree of canonical parameters (arrays in the canonical layout, outputs x inputs), in their own dtypes."""
    leaves: dict[Place, Any] = {}
    for name, array in parameters.items():
        path = place(name, array.ndim)
        leaves[path] = jnp.asarray(array.T if transposed(path) else array)
    return nested(leaves)


def load(
    tensors: Tensors,
    keymap: KeyMap,
    shapes: Mapping[str, tuple[int, ...]],
    tied: Iterable[str],
    *,
    ignore_mismatched_sizes: bool = False,
) -> tuple[Tree, Report]:
    """The tree of a model with canonical parameters of these shapes, as far as the files hold it, in their dtypes.

    MissingKeys, UnexpectedKeys, UnreadKeys and ShapeMismatch name the first tensor that does not fit.
    """
    weights, report = fitted(tensors, keymap, shapes, tied, ignore_mismatched_sizes=ignore_mismatched_sizes)
    leaves: dict[Place, Any] = {}
    for canonical, shape in weights.shapes().items():
        if (kind := weights.dtype(canonical)) not in FLOATS:
            raise CheckpointError(f"{canonical} has the dtype {kind}: a Flax model takes plain floats")
        path = place(canonical, len(shape))
        array = weights.read(canonical)
        leaves[path] = jnp.asarray(array.T if transposed(path) else array)
    return nested(leaves), report


@dataclass(frozen=True)
class TreeWeights:
    """A tree's leaves by canonical name and layout, as NumPy arrays."""

    tree: Mapping[str, Any]
    canonical: Mapping[str, tuple[int, ...]]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.canonical

    def dtype(self, canonical: str) -> str:
        return dtype_of(self._leaf(canonical))

    def read(self, canonical: str) -> Any:
        array = np.asarray(jax.device_get(self._leaf(canonical)))
        return array.T if transposed(self._path(canonical)) else array

    def _path(self, canonical: str) -> Place:
        return place(canonical, len(self.canonical[canonical]))

    def _leaf(self, canonical: str) -> Any:
        node: Any = self.tree
        for name in self._path(canonical):
            node = node[name]
        return node


@dataclass(frozen=True)
class Arrays:
    """Arrays in memory, by the names of a file."""

    arrays: Mapping[str, Any]

    def __iter__(self) -> Any:
        return iter(self.arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.arrays[name].shape)

    def dtype(self, name: str) -> str:
        return dtype_of(self.tensor(name))

    def path(self, name: str) -> Path:
        del name
        return Path("the state dict")

    def tensor(self, name: str) -> Any:
        return np.asarray(self.arrays[name])
