"""How a model's parameters are split over several devices: one plan by canonical names, for every framework.

Devices form a mesh, and its axes split by what they are for:

- data: the rows of a batch; every device holds all parameters.
- fsdp: the rows too, and the parameters along the model's width, which are gathered where they are used
  (arXiv:2304.11277).
- tensor: the parameters alone (arXiv:1909.08053): layers that widen by their outputs, those that narrow by their
  inputs, tables of the vocabulary by their rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from monoblock.heads import KINDS, HeadSpec
from monoblock.spec import ArchSpec
from monoblock.tree import parameters

Names = tuple[str, ...]
AxisNames = str | Names | None  # an axis, several that split together, the first one coarsest, or none

# The end of a canonical name -> the axis of its shape (matrices are outputs x inputs) that the tensor axis splits, and
# the one of the model's width, which fsdp splits. Whole on every device are norms, all biases but those of widening
# layers, and tables of positions and distances, which are small.
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
    """The axes of a mesh by what they split. Several names split one after the other, the first one coarsest."""

    data: Names = ()
    fsdp: Names = ()
    tensor: Names = ()

    @staticmethod
    def of(
        sizes: Mapping[str, int], *, data: AxisNames = None, fsdp: AxisNames = None, tensor: AxisNames = None
    ) -> Axes:
        """Those axes of a mesh of these sizes. ValueError if it lacks one, or one is there twice."""
        found = {"data": axis_names(data), "fsdp": axis_names(fsdp), "tensor": axis_names(tensor)}
        for what, axes in found.items():
            for axis in axes:
                if axis not in sizes:
                    there = ", ".join(map(repr, sizes)) or "none"
                    raise ValueError(
                        f"the mesh has no axis {axis!r} (it has {there}): name one with {what}_axis= or None"
                    )
            if len(set(axes)) < len(axes):
                raise ValueError(f"{what}_axis={axes} names an axis twice: give each one once")
        if twice := set(found["tensor"]) & set(found["fsdp"]):
            raise ValueError(
                f"the axis {min(twice)!r} is in tensor_axis and in fsdp_axis, and can split a parameter once only: "
                "leave it out of one of them"
            )
        return Axes(**found)

    @property
    def rows(self) -> Names:
        """What splits the rows of a batch; an axis may be both data's and fsdp's."""
        return tuple(dict.fromkeys((*self.data, *self.fsdp)))


def axis_names(axis: AxisNames) -> Names:
    """The names of an axis, of several, or of none."""
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def shard_count(axes: Names, sizes: Mapping[str, int]) -> int:
    """Into how many parts axes of a mesh of these sizes split."""
    return prod(sizes[axis] for axis in axes)


def axes_text(axes: Names) -> str:
    """Axes for a message."""
    return f"axis {axes[0]!r}" if len(axes) == 1 else "axes " + " and ".join(map(repr, axes))


def split(
    spec: ArchSpec, head: HeadSpec | None, axes: Axes, sizes: Mapping[str, int]
) -> dict[str, tuple[Names, ...]]:
    """Canonical name -> the mesh's axes that split each axis of its shape, on a mesh of these sizes.

    ValueError if the tensor axis does not divide the layers' sizes, or the fsdp axis the width. A vocabulary that the
    tensor axis does not divide stays whole along it: published ones are of any size, and no layer depends on it.
    `[q|k|v]` and `[gate|up]` are one axis here: where no compiler moves what ends up elsewhere, split each of their
    pieces for itself.
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
            f"the {size} {what} do not split into the {count} parts of the mesh's {axes_text(axes)}: give a mesh whose "
            f"parts divide them, or {argument}=None"
        )
