"""Parameters and batches on a mesh of devices, by `jax.sharding`: data-parallel, fully sharded and tensor-parallel.

Nothing of the model changes: `jit` sees where its arguments lie and adds the communication that is needed. The devices
may be those of several processes; each then makes the same calls, and holds what lies on its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from monoblock.backends.flax.explicit import automatic, spec_of
from monoblock.backends.flax.gathering import Gathering
from monoblock.backends.flax.loading import LeafGroup, flat, nested
from monoblock.backends.flax.placement import put
from monoblock.heads import KINDS, HeadSpec
from monoblock.partition import Axes, AxisNames, Names, axes_text, axis_names, shard_count, split
from monoblock.spec import ArchSpec

if TYPE_CHECKING:
    from monoblock.backends.flax.network import Network

Tree = dict[str, Any]
T = TypeVar("T")


def partition_specs(
    groups: Mapping[str, LeafGroup], spec: ArchSpec, head: HeadSpec | None, mesh: Mesh, axes: Axes
) -> Tree:
    """A tree like the parameters', of a PartitionSpec each: the shared plan (`partition.py`) on the mesh."""
    plan, leaves = split(spec, head, axes, mesh.shape), {}
    for name, group in groups.items():
        for leaf in group.leaves:
            split_by = (
                plan[name][::-1] if leaf.path[-1] == "kernel" else plan[name]
            )  # kernel: inputs x outputs
            leaves[leaf.path] = PartitionSpec(*map(_entry, split_by)) if any(split_by) else PartitionSpec()
    return nested(leaves)


def _entry(axes: Names) -> str | Names | None:
    """One axis's entry in a PartitionSpec."""
    return axes if len(axes) > 1 else axes[0] if axes else None


def shard_batch(batch: T, mesh: Mesh, axes: Axes) -> T:
    """A tree of arrays with their rows (first axes) split over the mesh; None stays None.

    ValueError if the mesh does not divide the rows.
    """
    count = shard_count(axes.rows, mesh.shape)
    rows = NamedSharding(mesh, PartitionSpec(_entry(axes.rows)))

    def shard_rows(path: Any, x: Any) -> Any:
        if x.ndim == 0 or x.shape[0] % count:
            what = f"{jax.tree_util.keystr(path)} of shape {x.shape}".strip()
            raise ValueError(
                f"the rows of {what} do not split into the {count} parts of the mesh's {axes_text(axes.rows)}: "
                f"give a multiple of {count} rows"
            )
        return put(x, rows)

    return jax.tree_util.tree_map_with_path(shard_rows, batch)


class Sharded:
    """What a model says and does about meshes of devices.

    `tensor_axis`, `fsdp_axis` and `data_axis` name axes of a mesh, each one, or several as a tuple, or none.
    """

    spec: ArchSpec
    module: Network
    params: Any
    groups: Any  # canonical name -> LeafGroup

    def partition_specs(
        self, mesh: Mesh, *, tensor_axis: AxisNames = "tensor", fsdp_axis: AxisNames = None
    ) -> Tree:
        """A PartitionSpec for each parameter, as a tree like `params`.

        The tensor axis splits layers that widen (query, key and value; gate and up) by their outputs, those that
        narrow by their inputs, tables of the vocabulary by their rows, where it divides these. The fsdp axis splits
        all matrices and tables along the model's width. Norms are whole on every device. ValueError if the mesh lacks
        an axis, or it does not divide a size.
        """
        axes = Axes.of(mesh.shape, tensor=tensor_axis, fsdp=fsdp_axis)
        return partition_specs(self.groups, self.spec, self.module.head_spec, mesh, axes)

    def param_shardings(
        self, mesh: Mesh, *, tensor_axis: AxisNames = "tensor", fsdp_axis: AxisNames = None
    ) -> Tree:
        """The same as NamedShardings: what `jit` takes as `out_shardings`, `jax.device_put` as places, Orbax to
        restore."""
        specs = self.partition_specs(mesh, tensor_axis=tensor_axis, fsdp_axis=fsdp_axis)
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    def laid_out(
        self,
        mesh: Mesh,
        *,
        tensor_axis: AxisNames = "tensor",
        fsdp_axis: AxisNames = None,
        data_axis: AxisNames = "data",
    ) -> Tree:
        """`param_shardings`, for parameters that are now laid so: with an fsdp axis, which splits rows besides the
        data axis, the network is from now on one that gathers them."""
        shardings = self.param_shardings(mesh, tensor_axis=tensor_axis, fsdp_axis=fsdp_axis)
        gathering = None
        if fsdp := axis_names(fsdp_axis):
            axes = Axes.of(mesh.shape, data=data_axis, fsdp=fsdp)
            rows = PartitionSpec(_entry(axes.rows), None, None)
            gathering = Gathering(NamedSharding(automatic(mesh), rows))
        self.module = self.module.clone(gathering=gathering)
        return shardings

    def shard_params(
        self,
        mesh: Mesh,
        params: Any = None,
        *,
        tensor_axis: AxisNames = "tensor",
        fsdp_axis: AxisNames = None,
        data_axis: AxisNames = "data",
    ) -> Tree:
        """The parameters, by default the model's, as arrays that lie on the mesh as `partition_specs` says.

        With an fsdp axis the model's calls gather them from now on, and split the rows of hidden states over it and the
        data axis.
        """
        shardings = self.laid_out(mesh, tensor_axis=tensor_axis, fsdp_axis=fsdp_axis, data_axis=data_axis)
        return jax.tree.map(put, self.params if params is None else params, shardings)

    def shard(
        self,
        mesh: Mesh,
        *,
        tensor_axis: AxisNames = "tensor",
        fsdp_axis: AxisNames = None,
        data_axis: AxisNames = "data",
    ) -> Self:
        """Lay the model's own parameters onto the mesh, as `shard_params` does; the model itself."""
        self.params = self.shard_params(
            mesh, tensor_axis=tensor_axis, fsdp_axis=fsdp_axis, data_axis=data_axis
        )
        return self

    def vocabulary_axes(self, params: Any) -> Any:
        """What splits the vocabulary of logits on explicit axes: the entry of a PartitionSpec, of the table that makes
        them; None if the type of the parameters says nothing of it."""
        head = self.module.head_spec
        if head is None or KINDS[head.kind].size != "vocab":
            return None
        group = self.groups.get("head.out.weight") or self.groups["embed.weight"]
        (leaf,) = group.leaves
        table = flat(params).get(leaf.path)
        axis = 1 if leaf.path[-1] == "kernel" else 0
        spec = () if table is None else spec_of(table)
        return spec[axis] if len(spec) > axis else None

    @staticmethod
    def shard_batch(batch: T, mesh: Mesh, *, data_axis: AxisNames = "data", fsdp_axis: AxisNames = None) -> T:
        """Inputs, arrays in dicts or lists, with their rows split over the mesh's data and fsdp axes. ValueError if the
        mesh lacks an axis, or does not divide the rows."""
        axes = Axes.of(mesh.shape, data=data_axis, fsdp=fsdp_axis)
        if not axes.rows:
            raise ValueError("shard_batch needs an axis to split the rows over: name one with data_axis=")
        return shard_batch(batch, mesh, axes)
