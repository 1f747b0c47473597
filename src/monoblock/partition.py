"""Plans for models on several devices: which dimension of each parameter is sharded, for every framework.

The axes of the mesh have three kinds:

- data: shards the batch; every device holds all parameters.
- fsdp: shards the batch, and the parameters along the model's width; they are all-gathered where they are used
  (arXiv:2304.11277).
- tensor: shards parameters only (arXiv:1909.08053): column-parallel (outputs) in qkv and up projections, row-parallel
  (inputs) in out and down projections, and vocabulary tables by rows.

`RULES` has the dimensions by canonical name. `split` gives them for a compiler that inserts the communication itself
(JAX). `tensor_plan` gives the slices of each tensor in the files, by its name there, for processes that hold only their
own shards (PyTorch), each of which is a model of the spec `shard_spec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, NamedTuple

from monoblock.checkpoint.keymap import Interleaved, KeyMap, Op, PerHead, Split, SplitEach, Transposed
from monoblock.heads import KINDS, HeadSpec
from monoblock.spec import Alibi, ArchSpec
from monoblock.tree import parameters, tied

Names = tuple[str, ...]
AxisNames = str | Names | None  # one axis, several that shard jointly (the first one is major), or none

Style = Literal["replicated", "column", "row", "vocabulary", "heads"]


class ShardRule(NamedTuple):
    """How a parameter is sharded: the dimension of the tensor axis, and that of the model's width, sharded by fsdp.
    Matrices are (outputs, inputs). "vocabulary": rows, in shards that may differ by one row; "heads": values of each
    head outside the matrices, small, and replicated by `split`."""

    style: Style
    tensor: int | None = None
    width: int | None = None


_REPLICATED = ShardRule("replicated")
# Suffix of a canonical name -> its rule. Replicated: norms, biases of row-parallel layers, and position tables.
RULES: dict[str, ShardRule] = {
    "attn.qkv.weight": ShardRule("column", 0, 1),
    "attn.qkv.bias": ShardRule("column", 0),
    "attn.out.weight": ShardRule("row", 1, 0),
    "mlp.up.weight": ShardRule("column", 0, 1),
    "mlp.up.bias": ShardRule("column", 0),
    "mlp.gate_up.weight": ShardRule("column", 0, 1),
    "mlp.gate_up.bias": ShardRule("column", 0),
    "mlp.down.weight": ShardRule("row", 1, 0),
    "embed.weight": ShardRule("vocabulary", 0, 1),
    "rel_bias.weight": ShardRule("heads", 1),
    "patch_embed.weight": ShardRule("replicated", None, 0),
    "head.dense.weight": ShardRule("replicated", None, 1),
    "head.summary.weight": ShardRule("replicated", None, 1),
    "head.out.weight": ShardRule("replicated", None, 1),
}
_VOCABULARY_HEAD = {
    "head.out.weight": ShardRule("vocabulary", 0, 1),
    "head.out.bias": ShardRule("vocabulary", 0),
}
_NORMS_OF_ALL_HEADS = {
    f"attn.{x}_norm.{p}": ShardRule("heads", 0) for x in ("q", "k") for p in ("weight", "bias")
}


def rules(spec: ArchSpec, head: HeadSpec | None) -> dict[str, ShardRule]:
    """Canonical name -> the rule of each parameter."""
    table = dict(RULES)
    if head is not None and KINDS[head.kind].size == "vocab":
        table |= _VOCABULARY_HEAD
    if spec.attention.qk_norm is not None and spec.attention.qk_norm.span == "width":
        table |= _NORMS_OF_ALL_HEADS
    return {
        name: table.get(name.split(".", 2)[2] if name.startswith("blocks.") else name, _REPLICATED)
        for name in parameters(spec, head)
    }


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
    shapes, found = parameters(spec, head), dict[str, tuple[Names, ...]]()
    for name, rule in rules(spec, head).items():
        wide = None if rule.style == "heads" else rule.tensor
        if rule.style == "vocabulary" and shapes[name][0] % tensor:
            wide = None
        found[name] = tuple(
            axes.tensor if axis == wide else axes.fsdp if axis == rule.width else ()
            for axis in range(len(shapes[name]))
        )
    return found


def _check(what: str, size: int, axes: Names, count: int, argument: str) -> None:
    if size % count:
        raise ValueError(
            f"the {size} {what} are not divisible by the {count} shards of the mesh's {axes_text(axes)}: give a mesh "
            f"whose size divides them, or {argument}=None"
        )


# ---------------------------------------------------------------------------- slices of files


@dataclass(frozen=True, kw_only=True)
class AlibiShard(Alibi):
    """ALiBi of some heads of a model: `heads` of them in all, from `first` on."""

    heads: int
    first: int

    def slopes(self, heads: int) -> tuple[float, ...]:
        """The slopes of these heads, `heads` of them."""
        return super().slopes(self.heads)[self.first : self.first + heads]


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """The shards of one tensor of a file along `dim` (None: replicated): each of the `sizes`, which add up to that
    dimension, is sharded for itself, since a fused matrix has several groups of rows."""

    canonical: str
    style: Style
    dim: int | None
    sizes: tuple[int, ...] = ()

    def slices(self, rank: int, count: int) -> tuple[slice, ...]:
        """The slices along `dim` of process `rank` of `count`, in the order in which its shard holds them."""
        found, start = list[slice](), 0
        for size in self.sizes:
            found.append(slice(start + size * rank // count, start + size * (rank + 1) // count))
            start += size
        return tuple(found)

    def size(self, rank: int, count: int) -> int:
        """The length of the shard along `dim`."""
        return sum(one.stop - one.start for one in self.slices(rank, count))


def check_shards(spec: ArchSpec, count: int, argument: str = "tensor_parallel") -> None:
    """ValueError: the layers do not divide into `count` equal shards; names what does not, and the counts that would
    do."""
    att = spec.attention
    divided = {
        "attention heads": att.heads,
        "key and value heads": att.kv_heads,
        "channels of the MLP": spec.mlp.width,
    }
    if count < 1:
        raise ValueError(f"{argument}={count}: give at least 1")
    wrong = [f"{size} {what}" for what, size in divided.items() if size % count]
    if spec.vocab < count:
        wrong.append(f"{spec.vocab} rows of the vocabulary")
    if wrong:
        fitting = [str(n) for n in range(1, att.kv_heads + 1) if not any(x % n for x in divided.values())]
        raise ValueError(
            f"{argument}={count}: the {' and the '.join(wrong)} do not divide into {count} shards: give "
            f"{' or '.join(fitting)}"
        )


def shard_spec(spec: ArchSpec, rank: int, count: int) -> ArchSpec:
    """The spec of the part of a model that process `rank` of `count` holds: its heads and channels of the MLP. Width
    and vocabulary are those of the whole. ValueError as of `check_shards`."""
    check_shards(spec, count)
    att, heads = spec.attention, spec.attention.heads // count
    alibi = spec.position(Alibi)
    return replace(
        spec,
        attention=replace(att, heads=heads, kv_heads=att.kv_heads // count),
        mlp=replace(spec.mlp, width=spec.mlp.width // count),
        positions=tuple(
            AlibiShard(bias_max=alibi.bias_max, heads=att.heads, first=rank * heads)
            if position is alibi and alibi is not None
            else position
            for position in spec.positions
        ),
    )


def shardings(
    spec: ArchSpec, head: HeadSpec | None, canonical: str, op: Op, rule: ShardRule | None = None
) -> tuple[Sharding, ...]:
    """The shards of the tensors in which files of layout `op` hold a canonical parameter of the whole model."""
    rule = rule or rules(spec, head)[canonical]
    shape = parameters(spec, head)[canonical]

    def one(dim: int | None, *sizes: int) -> Sharding:
        return Sharding(
            canonical=canonical, style=rule.style, dim=dim, sizes=sizes if dim is not None else ()
        )

    dim = rule.tensor
    if isinstance(op, Split | SplitEach):
        return tuple(one(dim, shape[0] if dim is None else size) for size in op.sizes)
    if dim is None:
        return (one(None),)
    if isinstance(op, PerHead | Interleaved):
        return (one(dim, shape[dim]),)
    att, last = spec.attention, canonical.split(".")[-2]
    kv = att.kv_heads * att.head_dim
    groups = {"qkv": (att.heads * att.head_dim, kv, kv), "gate_up": (spec.mlp.width, spec.mlp.width)}
    sizes = groups.get(last, (shape[dim],))
    return (one(1 - dim if isinstance(op, Transposed) and len(shape) == 2 else dim, *sizes),)


def shard_op(op: Op, count: int) -> Op:
    """The layout of a shard of a column-parallel matrix whose whole has layout `op`."""
    match op:
        case Split(sizes=sizes):
            return Split(tuple(size // count for size in sizes))
        case SplitEach(sizes=sizes, ops=ops):
            return SplitEach(
                tuple(size // count for size in sizes), tuple(shard_op(one, count) for one in ops)
            )
        case PerHead(heads=heads):
            return PerHead(heads // count)
        case Interleaved(heads=heads):
            return Interleaved(heads // count)
        case _:
            return op


def shard_shapes(spec: ArchSpec, head: HeadSpec | None, rank: int, count: int) -> dict[str, tuple[int, ...]]:
    """Canonical name -> the canonical shape of each parameter's shard."""
    table, found = rules(spec, head), dict[str, tuple[int, ...]]()
    for name, whole in parameters(spec, head).items():
        shape = list(whole)
        if (dim := table[name].tensor) is not None:
            shape[dim] = shape[dim] * (rank + 1) // count - shape[dim] * rank // count
        found[name] = tuple(shape)
    return found


def tensor_plan(spec: ArchSpec, head: HeadSpec | None, keymap: KeyMap) -> dict[str, Sharding]:
    """The sharding of every tensor of a model's files, by its name there; a tied head's name has that of the table
    that it shares."""
    table, found = rules(spec, head), dict[str, Sharding]()
    for canonical in parameters(spec, head):
        source = keymap.source(canonical)
        shards = shardings(spec, head, canonical, source.op, table[canonical])
        found |= dict(zip(source.names, shards, strict=True))
    for second, first in tied(spec, head).items():
        found[keymap.source(second).names[0]] = found[keymap.source(first).names[0]]
    return found
