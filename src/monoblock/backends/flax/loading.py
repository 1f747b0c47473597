"""Conversion between checkpoint files and Flax's tree of parameters, one tensor at a time.

The tree has transformers' module names and Flax's leaf names: `transformer.h.0.attn.c_proj.weight` is
`params["transformer"]["h"]["0"]["attn"]["c_proj"]["kernel"]`, inputs x outputs. Tensors of all checkpoint formats are
identified by canonical names (`checkpoint/keymap.py`), each stored in one or several leaves.
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

TABLES = ("embed", "pos_embed", "rel_bias")  # modules whose weight is named `embedding`


@dataclass(frozen=True)
class ParamLeaf:
    """A leaf of the tree: path, shape, transformers' parameter name, and whether files store it transposed."""

    path: LeafPath
    shape: tuple[int, ...]
    name: str
    transposed: bool

    def convert(self, array: Any) -> Any:
        """Convert an array between the layout of files and that of the leaf; its own inverse."""
        return array.T if self.transposed else array


@dataclass(frozen=True)
class LeafGroup:
    """The leaves that store one canonical parameter, and the operation between them."""

    op: Op
    leaves: tuple[ParamLeaf, ...]


def groups(keymap: KeyMap, shapes: Mapping[str, tuple[int, ...]], layout: ModuleSpec) -> dict[str, LeafGroup]:
    """The leaves of each canonical parameter (of these shapes), for a class with that module tree."""
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
    """A tree of dicts from leaves by path."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def flat(tree: Mapping[str, Any], above: LeafPath = ()) -> dict[LeafPath, Any]:
    """The leaves of a tree of dicts by path."""
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
    to_device: Callable[[ParamLeaf, Any], Any],
    *,
    ignore_mismatched_sizes: bool = False,
    strict: bool = True,
) -> tuple[Tree, LoadReport]:
    """Load a tree of parameters from files, in the files' dtypes; missing parameters are left out.

    `shapes`: those of the canonical parameters. `own`: their leaves. `to_device` makes a leaf from a view of the file,
    of which it may read a shard only. MissingKeys, UnexpectedKeys, UnreadKeys and ShapeMismatch name the first tensor
    that does not fit."""
    weights, report = match_weights(
        tensors, keymap, shapes, tied, ignore_mismatched_sizes=ignore_mismatched_sizes, strict=strict
    )
    leaves: dict[LeafPath, Any] = {}
    for canonical in weights.shapes():
        group = own[canonical]
        for leaf, array in zip(group.leaves, weights.stored(canonical, group.op), strict=True):
            if (kind := dtype_of(array)) not in FLOATS:
                raise CheckpointError(f"{leaf.name} has the dtype {kind}: a Flax model takes plain floats")
            leaves[leaf.path] = to_device(leaf, leaf.convert(array))
    return nested(leaves), report


def file_tensors(
    arrays: Mapping[LeafPath, Any], leaves: Iterable[ParamLeaf], read: Callable[[LeafPath], Any]
) -> dict[str, LazyTensor]:
    """A lazy NumPy tensor for each of transformers' parameter names, in the layout of files; `read` returns the values
    of a leaf."""
    return {
        leaf.name: _lazy_tensor(arrays[leaf.path], partial(_read_converted, leaf, read), leaf.transposed)
        for leaf in leaves
    }


def leaf_tensors(arrays: Mapping[LeafPath, Any], read: Callable[[LeafPath], Any]) -> dict[str, LazyTensor]:
    """A lazy NumPy tensor for each leaf, by its path joined with slashes."""
    return {
        "/".join(path): _lazy_tensor(leaf, partial(read, path), transposed=False)
        for path, leaf in arrays.items()
    }


def _lazy_tensor(leaf: Any, make: Any, transposed: bool) -> LazyTensor:
    shape = tuple(np.shape(leaf))
    return LazyTensor(dtype=dtype_of(leaf), shape=shape[::-1] if transposed else shape, make=make)


def _read_converted(leaf: ParamLeaf, read: Callable[[LeafPath], Any]) -> Any:
    return leaf.convert(read(leaf.path))


@dataclass(frozen=True)
class Arrays:
    """Arrays in memory with the interface of a checkpoint file."""

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
