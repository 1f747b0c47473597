"""Meshes with explicit axes (`jax.make_mesh`, `jax.set_mesh`).

With explicit axes, an array's type includes its sharding, and operations with an ambiguous output sharding must specify
it. The network does not: it runs on the same devices with automatic axes, where the compiler chooses shardings, and its
outputs are resharded onto the explicit axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from monoblock.backends.flax.placement import put
from monoblock.partition import axis_names, shard_count

T = TypeVar("T")


def explicit(*trees: Any) -> Mesh | AbstractMesh | None:
    """The mesh with explicit axes of an array in the trees or of the context, preferably a concrete one; None if there
    is none."""
    context = jax.sharding.get_abstract_mesh()
    found = context if _is_explicit(context) else None
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, jax.Array) and _is_explicit(mesh := _mesh_of(leaf)):
            if isinstance(mesh, Mesh):
                return mesh
            found = found or mesh
    return found


def _mesh_of(leaf: jax.Array) -> Any:
    """The mesh of an array; of a tracer, that of its type."""
    sharding = jax.typeof(leaf).sharding if isinstance(leaf, Tracer) else leaf.sharding
    return getattr(sharding, "mesh", None)


def _is_explicit(mesh: Any) -> bool:
    return mesh is not None and AxisType.Explicit in mesh.axis_types


def automatic(mesh: Mesh) -> Mesh:
    """The mesh with its explicit axes made automatic."""
    kinds = {AxisType.Explicit: AxisType.Auto}
    return Mesh(
        mesh.devices, mesh.axis_names, axis_types=tuple(kinds.get(kind, kind) for kind in mesh.axis_types)
    )


def on_automatic(leaf: Any) -> Any:
    """An array on explicit axes as the same array on automatic ones; anything else unchanged. For tracers, these must
    be the axes of the context."""
    if not isinstance(leaf, jax.Array) or not _is_explicit(_mesh_of(leaf)):
        return leaf
    if isinstance(leaf, Tracer):
        return jax.sharding.reshard(leaf, PartitionSpec())  # types do not include automatic axes
    sharding: Any = leaf.sharding
    return jax.device_put(leaf, NamedSharding(automatic(sharding.mesh), sharding.spec))  # shares memory


def run(
    mesh: Mesh | AbstractMesh, function: Callable[..., T], trees: tuple[Any, ...], specs: Callable[[T], Any]
) -> T:
    """`function(*trees)` on automatic axes; its result is resharded onto the mesh's explicit axes. `specs(result)`: a
    tree of the same structure with a PartitionSpec for each array."""
    abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    kinds = zip(abstract.axis_names, abstract.axis_types, strict=True)
    inner = abstract.update_axis_types({n: AxisType.Auto for n, kind in kinds if kind == AxisType.Explicit})
    with jax.sharding.use_abstract_mesh(inner):
        result = function(*jax.tree.map(on_automatic, trees))

    def reshard(leaf: Any, spec: PartitionSpec) -> Any:
        sharding = NamedSharding(mesh, spec)
        concrete = isinstance(mesh, Mesh) and not isinstance(leaf, Tracer)
        return put(leaf, sharding) if concrete else jax.sharding.reshard(leaf, sharding)

    return jax.tree.map(reshard, result, specs(result))


@dataclass
class Layout:
    """The shardings of outputs on explicit axes: rows as in the inputs, a cache as the input cache, the vocabulary of
    logits as in the output matrix; all else is replicated."""

    mesh: Mesh | AbstractMesh
    rows: Any = None  # an entry of a PartitionSpec
    vocabulary: Any = None
    cache: dict[Any, PartitionSpec] = field(default_factory=dict)  # by path

    @classmethod
    def of(cls, mesh: Mesh | AbstractMesh, inputs: Any, cache: Any = None, vocabulary: Any = None) -> Layout:
        """The layout of a call with these inputs."""
        leaves = jax.tree_util.tree_leaves_with_path(cache)
        return cls(mesh, _rows(inputs), vocabulary, {path: spec_of(leaf) for path, leaf in leaves})

    def __call__(self, result: Any) -> Any:
        """A tree with the PartitionSpec of each output."""
        return jax.tree_util.tree_map_with_path(self._spec, result)

    def _spec(self, path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        name = getattr(path[0], "name", getattr(path[0], "key", None)) if path else None
        if name == "past_key_values" and self.cache:
            return self.cache[path[1:]]
        if leaf.ndim == 0:
            return PartitionSpec()
        sizes = self.mesh.shape
        rows = None if leaf.shape[0] % shard_count(axis_names(self.rows), sizes) else self.rows
        if name != "logits" or leaf.shape[-1] % shard_count(axis_names(self.vocabulary), sizes):
            return PartitionSpec(rows)
        rest = [axis for axis in axis_names(self.vocabulary) if axis not in axis_names(rows)]
        return PartitionSpec(rows, *[None] * (leaf.ndim - 2), tuple(rest) or None)


def _rows(inputs: Any) -> Any:
    """The PartitionSpec entry of the inputs' rows: that of the first array that has one."""
    arrays = (leaf for leaf in jax.tree.leaves(inputs) if isinstance(leaf, jax.Array) and leaf.ndim > 1)
    return next((spec[0] for leaf in arrays if (spec := spec_of(leaf)) and spec[0] is not None), None)


def spec_of(leaf: Any) -> PartitionSpec:
    """The PartitionSpec of an array on explicit axes."""
    return jax.typeof(leaf).sharding.spec
