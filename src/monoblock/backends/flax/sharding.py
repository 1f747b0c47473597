"""Parameters and batches on a mesh of devices: data-parallel and tensor-parallel, by `jax.sharding`.

Nothing of the model changes: `jit` sees where its arguments lie and adds the communication that is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from monoblock.backends.flax.loading import Group, nested
from monoblock.heads import HeadSpec
from monoblock.partition import tensor_axes
from monoblock.spec import ArchSpec

if TYPE_CHECKING:
    from monoblock.backends.flax.network import Network

Tree = dict[str, Any]
T = TypeVar("T")


def partition_specs(
    groups: Mapping[str, Group],
    spec: ArchSpec,
    head: HeadSpec | None,
    mesh: Mesh,
    tensor_axis: str | None = "tensor",
) -> Tree:
    """A tree like the parameters', of a PartitionSpec each: the shared plan (`partition.py`) on the mesh's axis of that
    name; None for it: every parameter whole on each device. What the axis does not divide stays whole.

    ValueError if the mesh has no such axis.
    """
    parts = 1 if tensor_axis is None else _size(mesh, tensor_axis, "tensor_axis")
    axes = tensor_axes(spec, head)
    leaves: dict[tuple[str, ...], PartitionSpec] = {}
    for name, group in groups.items():
        for leaf in group.leaves:
            axis = axes[name]
            if axis is not None and leaf.path[-1] == "kernel":
                axis = 1 - axis  # a kernel lies inputs x outputs
            if axis is None or tensor_axis is None or leaf.shape[axis] % parts:
                leaves[leaf.path] = PartitionSpec()
                continue
            names: list[str | None] = [None] * len(leaf.shape)
            names[axis] = tensor_axis
            leaves[leaf.path] = PartitionSpec(*names)
    return nested(leaves)


def shard_batch(batch: T, mesh: Mesh, data_axis: str = "data") -> T:
    """A tree of arrays with their rows (first axes) split over the mesh's axis of that name; None stays None.

    ValueError if the mesh has no such axis, or does not divide the rows.
    """
    parts = _size(mesh, data_axis, "data_axis")
    rows = NamedSharding(_automatic(mesh), PartitionSpec(data_axis))

    def put(path: Any, x: Any) -> Any:
        if x.ndim == 0 or x.shape[0] % parts:
            what = f"{jax.tree_util.keystr(path)} of shape {x.shape}".strip()
            raise ValueError(
                f"the rows of {what} do not split into the {parts} parts of the mesh's axis {data_axis!r}: "
                f"give a multiple of {parts} rows"
            )
        return jax.device_put(x, rows)

    return jax.tree_util.tree_map_with_path(put, batch)


def _size(mesh: Mesh, axis: str, argument: str) -> int:
    if axis not in mesh.shape:
        names = ", ".join(map(repr, mesh.shape)) or "none"
        none = " or None" if argument == "tensor_axis" else ""
        raise ValueError(f"the mesh has no axis {axis!r} (it has {names}): name one with {argument}={none}")
    return mesh.shape[axis]


def _automatic(mesh: Mesh) -> Mesh:
    """The same mesh with every axis left to the compiler: on explicit axes, as `jax.make_mesh` gives them, each
    operation of a model would have to say how its output lies."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


class Sharded:
    """What a model says and does about meshes of devices."""

    spec: ArchSpec
    module: Network
    params: Any
    groups: Any  # canonical name -> Group

    def partition_specs(self, mesh: Mesh, *, tensor_axis: str | None = "tensor") -> Tree:
        """A PartitionSpec for each parameter, as a tree like `params`.

        Layers that widen (query, key and value; gate and up) are split by their outputs over the mesh's axis of that
        name, those that narrow by their inputs, tables of the vocabulary by their rows. What the axis does not divide
        is whole on every device, as everything is with `tensor_axis=None`. ValueError if the mesh lacks the axis.
        """
        return partition_specs(self.groups, self.spec, self.module.head_spec, mesh, tensor_axis)

    def param_shardings(self, mesh: Mesh, *, tensor_axis: str | None = "tensor") -> Tree:
        """The same as NamedShardings: what `jit` takes as `out_shardings`, `jax.device_put` as places, Orbax to
        restore. Their mesh has automatic axes."""
        automatic, specs = _automatic(mesh), self.partition_specs(mesh, tensor_axis=tensor_axis)
        return jax.tree.map(lambda spec: NamedSharding(automatic, spec), specs)

    def shard_params(self, mesh: Mesh, params: Any = None, *, tensor_axis: str | None = "tensor") -> Tree:
        """The parameters, by default the model's, as arrays that lie on the mesh as `partition_specs` says."""
        shardings = self.param_shardings(mesh, tensor_axis=tensor_axis)
        return jax.device_put(self.params if params is None else params, shardings)

    def shard(self, mesh: Mesh, *, tensor_axis: str | None = "tensor") -> Self:
        """Lay the model's own parameters onto the mesh; the model itself."""
        self.params = self.shard_params(mesh, tensor_axis=tensor_axis)
        return self

    @staticmethod
    def shard_batch(batch: T, mesh: Mesh, *, data_axis: str = "data") -> T:
        """Inputs, arrays in dicts or lists, with their rows split over the mesh's axis of that name. ValueError if the
        mesh lacks the axis, or it does not divide the rows."""
        return shard_batch(batch, mesh, data_axis)
