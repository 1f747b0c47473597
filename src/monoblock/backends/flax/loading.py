"""Weights between files and Flax's tree of parameters, one tensor at a time.

The tree has the paths of the hub's names and Flax's names of leaves: `transformer.h.0.attn.c_proj.weight` is
`params["transformer"]["h"]["0"]["attn"]["c_proj"]["kernel"]`, inputs x outputs. Checkpoints of any spelling come by
canonical names (`checkpoint/keymap.py`), which one leaf or several hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from monoblock.backends.flax.layers import own_norm
from monoblock.checkpoint.casts import FLOATS, dtype_of
from monoblock.checkpoint.keymap import KeyMap, Op, TensorSource, Transposed
from monoblock.checkpoint.matching import LoadReport, match_weights
from monoblock.checkpoint.save import LazyTensor
from monoblock.checkpoint.weights import Tensors, stored_shapes
from monoblock.errors import CheckpointError
from monoblock.modules import CANONICAL, ModuleSpec, classes_of

Tree = dict[str, Any]
LeafPath = tuple[str, ...]

TABLES = ("embed", "pos_embed", "rel_bias")  # whose weight is called `embedding`


@dataclass(frozen=True)
class ParamLeaf:
    """A leaf of the tree: its path and shape, the hub's name of it, and whether the hub has the other axis first."""

    path: LeafPath
    shape: tuple[int, ...]
    name: str
    transposed: bool

    def of_hub(self, array: Any) -> Any:
        """The hub's array as the leaf's, or the other way round."""
        return array.T if self.transposed else array


@dataclass(frozen=True)
class LeafGroup:
    """The leaves that one canonical parameter becomes, and how."""

    op: Op
    leaves: tuple[ParamLeaf, ...]


def groups(keymap: KeyMap, shapes: Mapping[str, tuple[int, ...]], layout: ModuleSpec) -> dict[str, LeafGroup]:
    """Where each canonical parameter (of these shapes) is in the tree of a class with that module tree."""
    named_weight = {
        CANONICAL[role] for role, classes in classes_of(layout) if role in CANONICAL and own_norm(classes)
    }
    return {name: _group(keymap.source(name), name, shape, named_weight) for name, shape in shapes.items()}


def _group(source: TensorSource, canonical: str, shape: tuple[int, ...], named_weight: set[str]) -> LeafGroup:
    module, _, kind = canonical.rpartition(".")
    leaf = kind
    if kind == "weight" and module.rpartition(".")[2] in TABLES:
        leaf = "embedding"
    elif kind == "weight" and len(shape) == 2:
        leaf = "kernel"
    elif kind == "weight" and re.sub(r"\.\d+\.", ".{i}.", module) not in named_weight:
        leaf = "scale"
    transposed = leaf == "kernel" and not isinstance(source.op, Transposed)
    return LeafGroup(
        source.op,
        tuple(
            ParamLeaf(
                path=(*name.split(".")[:-1], leaf),
                shape=stored[::-1] if transposed else stored,
                name=name,
                transposed=transposed,
            )
            for name, stored in zip(source.names, stored_shapes(source.op, shape), strict=True)
        ),
    )


def nested(leaves: Mapping[LeafPath, Any]) -> Tree:
    """A tree of dicts from leaves by their paths."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def flat(tree: Mapping[str, Any], above: LeafPath = ()) -> dict[LeafPath, Any]:
    """The leaves of a tree of dicts by their paths."""
    found: dict[LeafPath, Any] = {}
    for name, node in tree.items():
        path = (*above, str(name))
        found |= flat(node, path) if isinstance(node, Mapping) else {path: node}
    return found


def load(
    tensors: Tensors,
    keymap: KeyMap,
    shapes: Mapping[str, tuple[int, ...]],
    tied: Iterable[str],
    own: Mapping[str, LeafGroup],
    place: Callable[[ParamLeaf, Any], Any],
    *,
    ignore_mismatched_sizes: bool = False,
    strict: bool = True,
) -> tuple[Tree, LoadReport]:
    """The tree of a model with canonical parameters of these shapes, which are these groups of leaves, as far as the
    files hold it, in their dtypes. `place` makes a leaf of a view of the file, of which it may read a part.

    MissingKeys, UnexpectedKeys, UnreadKeys and ShapeMismatch name the first tensor that does not fit.
    """
    weights, report = match_weights(
        tensors, keymap, shapes, tied, ignore_mismatched_sizes=ignore_mismatched_sizes, strict=strict
    )
    leaves: dict[LeafPath, Any] = {}
    for canonical in weights.shapes():
        group = own[canonical]
        for leaf, array in zip(group.leaves, weights.stored(canonical, group.op), strict=True):
            if (kind := dtype_of(array)) not in FLOATS:
                raise CheckpointError(f"{leaf.name} has the dtype {kind}: a Flax model takes plain floats")
            leaves[leaf.path] = place(leaf, leaf.of_hub(array))
    return nested(leaves), report


def hub_arrays(
    arrays: Mapping[LeafPath, Any], leaves: Iterable[ParamLeaf], read: Callable[[LeafPath], Any]
) -> dict[str, LazyTensor]:
    """The hub's names, and what makes each tensor, of which these are the arrays, in NumPy and the hub's layout; `read`
    gives an array's values."""
    return {
        leaf.name: _made(arrays[leaf.path], partial(_of_hub, leaf, read), leaf.transposed) for leaf in leaves
    }


def own_arrays(arrays: Mapping[LeafPath, Any], read: Callable[[LeafPath], Any]) -> dict[str, LazyTensor]:
    """The leaves' paths, with slashes, and what makes each in NumPy."""
    return {
        "/".join(path): _made(leaf, partial(read, path), transposed=False) for path, leaf in arrays.items()
    }


def _made(leaf: Any, make: Any, transposed: bool) -> LazyTensor:
    shape = tuple(np.shape(leaf))
    return LazyTensor(dtype=dtype_of(leaf), shape=shape[::-1] if transposed else shape, make=make)


def _of_hub(leaf: ParamLeaf, read: Callable[[LeafPath], Any]) -> Any:
    return leaf.of_hub(read(leaf.path))


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
