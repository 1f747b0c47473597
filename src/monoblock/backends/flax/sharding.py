"""Sharding of parameters and batches over a mesh with `jax.sharding`: data parallelism, FSDP and tensor parallelism.

The model is unchanged: `jit` adds the communication that the shardings of its arguments require. The devices may belong
to several processes, which all make the same calls and hold their own shards.
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
    """A tree with the PartitionSpec of each parameter, from the framework-independent plan (`partition.py`)."""
    plan, leaves = split(spec, head, axes, mesh.shape), {}
    for name, group in groups.items():
        for leaf in group.leaves:
            split_by = (
                plan[name][::-1] if leaf.path[-1] == "kernel" else plan[name]
            )  # kernel: inputs x outputs
            leaves[leaf.path] = PartitionSpec(*map(_entry, split_by)) if any(split_by) else PartitionSpec()
    return nested(leaves)


def _entry(axes: Names) -> str | Names | None:
    """The entry of one array axis in a PartitionSpec."""
    return axes if len(axes) > 1 else axes[0] if axes else None


def shard_batch(batch: T, mesh: Mesh, axes: Axes) -> T:
    """A tree of arrays sharded by rows (first axis) over the mesh; None stays None.

    ValueError if the number of rows is not divisible.
    """
    count = shard_count(axes.rows, mesh.shape)
    rows = NamedSharding(mesh, PartitionSpec(_entry(axes.rows)))

    def shard_rows(path: Any, x: Any) -> Any:
        if x.ndim == 0 or x.shape[0] % count:
            name = f"{jax.tree_util.keystr(path)} of shape {x.shape}".strip()
            raise ValueError(
                f"the rows of {name} do not split into the {count} parts of the mesh's {axes_text(axes.rows)}: "
                f"give a multiple of {count} rows"
            )
        return put(x, rows)

    return jax.tree_util.tree_map_with_path(shard_rows, batch)


class Sharded:
    """Sharding methods of a model.

    `tensor_axis`, `fsdp_axis` and `data_axis` are each the name of a mesh axis, a tuple of names, or None.
    """

    spec: ArchSpec
    module: Network
    params: Any
    groups: Any  # canonical name -> LeafGroup

    def partition_specs(
        self, mesh: Mesh, *, tensor_axis: AxisNames = "tensor", fsdp_axis: AxisNames = None
    ) -> Tree:
        """A PartitionSpec for each parameter, as a tree like `params`.

        The tensor axis shards column-parallel layers (query, key and value; gate and up) by their outputs, row-parallel
        layers (attention output; down) by their inputs, and vocabulary matrices by rows, if divisible. The fsdp axis
        shards all matrices along the model's width. Norms are replicated. ValueError if the mesh lacks an axis, or if a
        size is not divisible.
        """
        axes = Axes.of(mesh.shape, tensor=tensor_axis, fsdp=fsdp_axis)
        return partition_specs(self.groups, self.spec, self.module.head_spec, mesh, axes)

    def param_shardings(
        self, mesh: Mesh, *, tensor_axis: AxisNames = "tensor", fsdp_axis: AxisNames = None
    ) -> Tree:
        """The same as NamedShardings: for `out_shardings` of `jit`, for `jax.device_put`, and for restoring with
        Orbax."""
        specs = self.partition_specs(mesh, tensor_axis=tensor_axis, fsdp_axis=fsdp_axis)
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    def set_up_sharding(
        self,
        mesh: Mesh,
        *,
        tensor_axis: AxisNames = "tensor",
        fsdp_axis: AxisNames = None,
        data_axis: AxisNames = "data",
    ) -> Tree:
        """`param_shardings`, and configure the network for them: with an fsdp axis, over which rows are sharded too,
        the network all-gathers its parameters."""
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
        """The parameters (by default the model's), sharded over the mesh by `partition_specs`.

        With an fsdp axis, the model's calls then all-gather them and shard the rows of hidden states over it and the
        data axis.
        """
        shardings = self.set_up_sharding(
            mesh, tensor_axis=tensor_axis, fsdp_axis=fsdp_axis, data_axis=data_axis
        )
        return jax.tree.map(put, self.params if params is None else params, shardings)

    def shard(
        self,
        mesh: Mesh,
        *,
        tensor_axis: AxisNames = "tensor",
        fsdp_axis: AxisNames = None,
        data_axis: AxisNames = "data",
    ) -> Self:
        """Shard the model's parameters over the mesh with `shard_params`; return the model."""
        self.params = self.shard_params(
            mesh, tensor_axis=tensor_axis, fsdp_axis=fsdp_axis, data_axis=data_axis
        )
        return self

    def vocabulary_axes(self, params: Any) -> Any:
        """The PartitionSpec entry of the vocabulary of logits on explicit axes, that of the output matrix; None if the
        parameters are not on explicit axes."""
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
        """Inputs (arrays in dicts or lists), sharded by rows over the mesh's data and fsdp axes. ValueError if the mesh
        lacks an axis, or if the number of rows is not divisible."""
        axes = Axes.of(mesh.shape, data=data_axis, fsdp=fsdp_axis)
        if not axes.rows:
            raise ValueError("shard_batch needs a mesh axis for the rows: name one with data_axis=")
        return shard_batch(batch, mesh, axes)
