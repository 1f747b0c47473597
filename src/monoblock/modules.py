"""The module tree of a model class, as data: transformers' names and classes, and the role that each module plays.

A family gives its tree as nested `part`s. A part is a module that holds others; its children are roles (of one module
each) or parts. What a part computes is its `kind`; a kind without a part of its own is computed by the part around it.
Frameworks build the tree and look modules up by role; `keymap` makes a checkpoint's key map of it,
which for today's files is the identity.

Kinds:
    model       the bare model          embeddings  ids to vectors, with positions
    stack       all layers              layer       one block (a list of them, numbered)
    attention   self-attention          wrapper     calls the part that it holds
    mlp         both matrices           mlp_add     the same, and adds the residual that comes second
    attention_norm, widen, narrow       attention, up and down, where a sub-layer adds its input and norms by itself
    pooler, lm_head, classifier_head, summary       heads with modules of their own
    head        a bare model and the modules of a head beside it
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from monoblock.checkpoint.keymap import KeyMap, KeyRow, Op, PerHead, Same, Spelling, Split, Transposed, row
from monoblock.spec import ArchSpec

# Roles of modules with parameters -> the canonical name that all frameworks share; `{i}` is the layer.
CANONICAL = {
    "embed": "embed",
    "pos_embed": "pos_embed",
    "rel_bias": "rel_bias",
    "patch_embed": "patch_embed",
    "embed_norm": "embed_norm",
    "norm1": "blocks.{i}.norm1",
    "qkv": "blocks.{i}.attn.qkv",
    "qkv_by_head": "blocks.{i}.attn.qkv",
    "q_norm": "blocks.{i}.attn.q_norm",
    "k_norm": "blocks.{i}.attn.k_norm",
    "out": "blocks.{i}.attn.out",
    "norm2": "blocks.{i}.norm2",
    "up": "blocks.{i}.mlp.up",
    "down": "blocks.{i}.mlp.down",
    "final_norm": "final_norm",
    "head_dense": "head.dense",
    "head_norm": "head.norm",
    "head_out": "head.out",
    "head_summary": "head.summary",
}
# Roles of the layers' matrices.
MATRICES = ("qkv", "out", "up", "down")
# Roles whose matrices are one in the canonical tree, in that order.
GROUPS: dict[tuple[str, ...], str] = {
    ("q", "k", "v"): "blocks.{i}.attn.qkv",
    ("gate", "up"): "blocks.{i}.mlp.gate_up",
}


@dataclass(frozen=True)
class ModuleSpec:
    """A module that holds others.

    `name` is transformers' class name, `children` maps attribute names to roles or parts. `classes` names the classes
    of some roles' modules where they are not PyTorch's own ("norm", "rotary", "act"; "linear": Conv1D's for matrices
    that are stored inputs x outputs). `tuples`: a layer returns a tuple, as transformers' does.
    """

    name: str
    kind: str
    children: Mapping[str, str | ModuleSpec]
    classes: Mapping[str, str] = field(default_factory=dict[str, str])
    tuples: bool = False

    def __hash__(self) -> int:
        return hash((self.name, self.kind, *self.children))  # cheap; equality compares the rest

    def paths(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(role or kind, path of attribute names) of everything below; a layer's number is "{i}"."""
        for name, child in self.children.items():
            if isinstance(child, str):
                yield child, (name,)
                continue
            steps = (name, "{i}") if child.kind == "layer" else (name,)
            yield ("layers", (name,)) if child.kind == "layer" else (child.kind, steps)
            for role, path in child.paths():
                yield role, (*steps, *path)


@dataclass(frozen=True)
class KerasNames:
    """The names of a family's layers and variables on Keras, beyond those that follow from the tree.

    `numbered`: a layer in a list. `table`: the token embedding's variable. `first`: attributes that are made before
    their siblings, in this order; Keras's `.h5` files hold weights in the order in which they were made.
    """

    numbered: str = "{name}_._{i}"
    table: str = "embeddings"
    first: tuple[str, ...] = ()


def module(
    name: str,
    kind: str,
    /,
    *,
    classes: Mapping[str, str] | None = None,
    tuples: bool = False,
    **children: str | ModuleSpec,
) -> ModuleSpec:
    """A part from its class name, its kind and its children."""
    return ModuleSpec(name, kind, children, classes or {}, tuples)


def keymap(
    tree: ModuleSpec,
    heads: Mapping[str, Mapping[str, str | ModuleSpec]],
    spec: ArchSpec,
    *,
    head: str | None,
    prefix: str,
    older: Mapping[str, tuple[str | Spelling, ...]] | None = None,
    head_rows: Mapping[str, tuple[KeyRow, ...]] | None = None,
    ignored: tuple[str, ...] = (),
    other_prefixes: tuple[str, ...] = (),
) -> KeyMap:
    """The key map of a family: each parameter under its module's name, then under `older` spellings.

    `older`: canonical name -> further names or spellings. `head_rows`: rows of heads that take the place of those made
    of `heads`.
    """
    made = {kind: _rows(dict(_paths(children)), spec, {}, False) for kind, children in heads.items()}
    base = {role: path for role, path in _paths(tree.children) if not role.startswith("head_")}
    transposed = any(p.classes.get("linear") == "Conv1D" for p in submodules(tree))
    return KeyMap(
        rows=_rows(base, spec, older or {}, transposed),
        heads={**made, **(head_rows or {})},
        head=head,
        prefix=prefix,
        ignored=ignored,
        other_prefixes=other_prefixes,
    )


def _rows(
    paths: Mapping[str, str],
    spec: ArchSpec,
    older: Mapping[str, tuple[str | Spelling, ...]],
    transposed: bool,
) -> tuple[KeyRow, ...]:
    att, mlp = spec.attention, spec.mlp
    paths = {role: path for role, path in paths.items() if role != "gate" or mlp.gated}
    kv = att.kv_heads * att.head_dim
    sizes: dict[tuple[str, ...], tuple[int, ...]] = {
        ("q", "k", "v"): (att.heads * att.head_dim, kv, kv),
        ("gate", "up"): (mlp.width, mlp.width),
    }
    found: list[tuple[str, Spelling]] = []
    grouped: set[str] = set()
    for roles, canonical in GROUPS.items():
        if all(role in paths for role in roles):
            names = tuple(f"{paths[role]}.{{p}}" for role in roles)
            found.append((canonical, Spelling(names, Split(sizes[roles]))))
            grouped |= set(roles)
    for role, canonical in CANONICAL.items():
        if role in paths and role not in grouped:
            op: Op = PerHead(att.heads) if role == "qkv_by_head" else Same()
            if transposed and role in MATRICES:
                op = Transposed()
            found.append((canonical, Spelling((f"{paths[role]}.{{p}}",), op)))
    return tuple(row(f"{name}.{{p}}", spelling, *older.get(name, ())) for name, spelling in found)


def _paths(children: Mapping[str, str | ModuleSpec]) -> Iterator[tuple[str, str]]:
    for role, path in ModuleSpec("", "", children).paths():
        yield role, ".".join(path)


def submodules(tree: ModuleSpec) -> Iterator[ModuleSpec]:
    """The part itself and all parts below it."""
    yield tree
    for child in tree.children.values():
        if isinstance(child, ModuleSpec):
            yield from submodules(child)


def with_outer_classes(child: ModuleSpec, outer: ModuleSpec) -> ModuleSpec:
    """The child with the classes of the part around it, where it names no others."""
    return replace(child, classes={**outer.classes, **child.classes})


def fused_role(roles: tuple[str, ...]) -> str:
    """The role, and the name, of a module that holds the matrices of a group as one."""
    return GROUPS[roles].rpartition(".")[2]


def with_fused(tree: ModuleSpec, groups: Iterable[tuple[str, ...]]) -> ModuleSpec:
    """The tree in which each of these groups of modules, where one part holds them, is one module."""
    children = {
        name: with_fused(child, groups) if isinstance(child, ModuleSpec) else child
        for name, child in tree.children.items()
    }
    for roles in groups:
        if all(role in children.values() for role in roles):
            children = {name: child for name, child in children.items() if child not in roles}
            children[fused_role(roles)] = fused_role(roles)
    return replace(tree, children=children)


def classes_of(tree: ModuleSpec) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Each role, and the classes that hold where it is."""
    for child in tree.children.values():
        if isinstance(child, ModuleSpec):
            yield from classes_of(with_outer_classes(child, tree))
        else:
            yield child, tree.classes


def class_tree(
    name: str, bare: ModuleSpec, prefix: str, heads: Mapping[str, str | ModuleSpec], kind: str | None
) -> ModuleSpec:
    """The module tree of the class `name` with a head of that kind: the bare model under its prefix and `heads` beside
    it, or the bare model itself. A pooler is a part of it where the head is one, or needs one."""
    pooled = kind in ("pooler", "choice")
    kept = {
        n: c
        for n, c in bare.children.items()
        if pooled or not (isinstance(c, ModuleSpec) and c.kind == "pooler")
    }
    bare = replace(bare, children=kept)
    return bare if kind in (None, "pooler") else ModuleSpec(name, "head", {prefix: bare, **heads})
