"""Sharding of parameters over a device mesh, by canonical names, for every framework.

The axes of the mesh have three kinds:

- data: shards the batch; every device holds all parameters.
- fsdp: shards the batch, and the parameters along the model's width; they are all-gathered where they are used
  (arXiv:2304.11277).
- tensor: shards parameters only (arXiv:1909.08053): column-parallel (outputs) in qkv and up projections, row-parallel
  (inputs) in out and down projections, and vocabulary tables by rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from monoblock.heads import KINDS, HeadSpec
from monoblock.spec import ArchSpec
from monoblock.tree import parameters

Names = tuple[str, ...]
AxisNames = str | Names | None  # one axis, several that shard jointly (the first one is major), or none

# Suffix of a canonical name -> the dimension sharded by the tensor axis, and the dimension of the model's width,
# sharded by fsdp; matrices are (outputs, inputs). Replicated: norms, biases of row-parallel layers, and position
# tables, which are small.
_LAYER: dict[str, tuple[int | None, int | None]] = {
    "attn.qkv.weight": (0, 1),
    "attn.qkv.bias": (0, None),
    "attn.out.weight": (1, 0),
    "mlp.up.weight": (0, 1),
    "mlp.up.bias": (0, None),
    "mlp.gate_up.weight": (0, 1),
    "mlp.gate_up.bias": (0, None),
    "mlp.down.weight": (1, 0),
}
_OUTSIDE: dict[str, tuple[int | None, int | None]] = {
    "embed.weight": (0, 1),
    "patch_embed.weight": (None, 0),
    "head.dense.weight": (None, 1),
    "head.summary.weight": (None, 1),
}
_HEAD: dict[bool, dict[str, tuple[int | None, int | None]]] = {
    True: {"head.out.weight": (0, 1), "head.out.bias": (0, None)},  # over the vocabulary
    False: {"head.out.weight": (None, 1)},
}
_VOCABULARY = ("embed.weight", "head.out.weight", "head.out.bias")


@dataclass(frozen=True)
class Axes:
    """The mesh axes of each kind. Several names shard jointly; the first one is major."""

    data: Names = ()
    fsdp: Names = ()
    tensor: Names = ()

    @staticmethod
    def of(
        sizes: Mapping[str, int], *, data: AxisNames = None, fsdp: AxisNames = None, tensor: AxisNames = None
    ) -> Axes:
        """Axes of a mesh with these sizes. ValueError if an axis is missing or used twice."""
        found = {"data": axis_names(data), "fsdp": axis_names(fsdp), "tensor": axis_names(tensor)}
        for what, axes in found.items():
            for axis in axes:
                if axis not in sizes:
                    there = ", ".join(map(repr, sizes)) or "none"
                    raise ValueError(
                        f"the mesh has no axis {axis!r} (it has {there}): give {what}_axis= one of these or None"
                    )
            if len(set(axes)) < len(axes):
                raise ValueError(f"{what}_axis={axes} names an axis twice: give each one once")
        if twice := set(found["tensor"]) & set(found["fsdp"]):
            raise ValueError(
                f"the axis {min(twice)!r} is in both tensor_axis and fsdp_axis, but can shard a parameter only once: "
                "remove it from one of them"
            )
        return Axes(**found)

    @property
    def rows(self) -> Names:
        """The axes that shard the batch; an axis may be of both kinds."""
        return tuple(dict.fromkeys((*self.data, *self.fsdp)))


def axis_names(axis: AxisNames) -> Names:
    """One, several or no axes as a tuple of names."""
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def shard_count(axes: Names, sizes: Mapping[str, int]) -> int:
    """The number of shards: the product of the sizes of these axes."""
    return prod(sizes[axis] for axis in axes)


def axes_text(axes: Names) -> str:
    """Axes as text for an error message."""
    return f"axis {axes[0]!r}" if len(axes) == 1 else "axes " + " and ".join(map(repr, axes))


def split(
    spec: ArchSpec, head: HeadSpec | None, axes: Axes, sizes: Mapping[str, int]
) -> dict[str, tuple[Names, ...]]:
    """Canonical name -> the mesh axes that shard each dimension of its shape, on a mesh of these sizes.

    ValueError if the tensor axis does not divide the layers' sizes, or the fsdp axis the width. A vocabulary that the
    tensor axis does not divide is replicated along it: published sizes are arbitrary, and no layer depends on it. The
    fused `[q|k|v]` and `[gate|up]` are sharded as one dimension; without a compiler that reshards, shard their
    components separately.
    """
    tensor, fsdp = shard_count(axes.tensor, sizes), shard_count(axes.fsdp, sizes)
    att = spec.attention
    for what, size in (
        ("channels of the queries", att.heads * att.head_dim),
        ("channels of the keys", att.kv_heads * att.head_dim),
        ("channels of the MLP", spec.mlp.width),
    ):
        _check(what, size, axes.tensor, tensor, "tensor_axis")
    _check("channels of the model's width", spec.width, axes.fsdp, fsdp, "fsdp_axis")
    of_vocabulary = head is not None and KINDS[head.kind].size == "vocab"
    table = _OUTSIDE | _HEAD[of_vocabulary]
    found: dict[str, tuple[Names, ...]] = {}
    for name, shape in parameters(spec, head).items():
        wide, width = (
            _LAYER.get(name.split(".", 2)[2], (None, None))
            if name.startswith("blocks.")
            else table.get(name, (None, None))
        )
        if wide is not None and name in _VOCABULARY and shape[wide] % tensor:
            wide = None
        found[name] = tuple(
            axes.tensor if axis == wide else axes.fsdp if axis == width else () for axis in range(len(shape))
        )
    return found


def _check(what: str, size: int, axes: Names, count: int, argument: str) -> None:
    if size % count:
        raise ValueError(
            f"the {size} {what} are not divisible by the {count} shards of the mesh's {axes_text(axes)}: give a mesh "
            f"whose size divides them, or {argument}=None"
        )
