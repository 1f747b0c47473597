"""The module tree of a model class as data: transformers' attribute and class names, and the role of each module.

A family defines its tree as nested `module(...)` specs. Children of a spec are roles (leaf modules) or further specs.
The `kind` of a spec determines what it computes; a kind without a spec of its own is computed by the enclosing one.
Frameworks build the tree and find modules by role. `keymap` derives a checkpoint's key map from the tree, which for
current files is the identity.

Kinds:
    model       the bare model          embeddings  ids to vectors, with positions
    stack       all layers              layer       one block (a list of them, numbered)
    attention   self-attention          wrapper     calls its only child
    mlp         both matrices           mlp_add     the same, and adds the residual given as second input
    attention_norm, widen, narrow       attention, up and down projections with their own residual and norm (BERT style)
    pooler, lm_head, classifier_head, summary       heads with submodules
    head        a bare model and the modules of its head
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from monoblock.checkpoint.keymap import KeyMap, KeyRow, Op, PerHead, Same, Spelling, Split, Transposed, row
from monoblock.spec import ArchSpec

# Role of a module with parameters -> its canonical name; `{i}` is the layer index.
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
# Roles of the blocks' matrices.
MATRICES = ("qkv", "out", "up", "down")
# Roles whose matrices are fused, in this order, in the canonical tree.
GROUPS: dict[tuple[str, ...], str] = {
    ("q", "k", "v"): "blocks.{i}.attn.qkv",
    ("gate", "up"): "blocks.{i}.mlp.gate_up",
}


@dataclass(frozen=True)
class ModuleSpec:
    """The spec of a module with children.

    `name`: transformers' class name. `children`: attribute name -> role or spec. `classes`: class names of leaf modules
    that are not PyTorch's ("norm", "rotary", "act"; "linear": "Conv1D" for matrices stored as (inputs, outputs)).
    `tuples`: the layer returns a tuple, as in transformers.
    """

    name: str
    kind: str
    children: Mapping[str, str | ModuleSpec]
    classes: Mapping[str, str] = field(default_factory=dict[str, str])
    tuples: bool = False

    def __hash__(self) -> int:
        return hash((self.name, self.kind, *self.children))  # cheap; equality compares all fields

    def paths(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(role or kind, path of attribute names) of all descendants; "{i}" is the layer index."""
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
    """Names of a family's Keras layers and variables that do not follow from the tree.

    `numbered`: template for a layer in a list. `table`: the variable of the token embedding. `first`: attributes that
    are created before their siblings, in this order; Keras's `.h5` files hold weights in the order of creation.
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
    """A ModuleSpec from its class name, its kind and its children."""
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
    """The key map of a family: each parameter under its module's name, then under its `older` spellings.

    `older`: canonical name -> further names or spellings. `head_rows`: rows of heads, in place of those derived from
    `heads`.
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
    """The spec itself and all specs below it."""
    yield tree
    for child in tree.children.values():
        if isinstance(child, ModuleSpec):
            yield from submodules(child)


def with_outer_classes(child: ModuleSpec, outer: ModuleSpec) -> ModuleSpec:
    """The child with the `classes` of its parent added, unless it overrides them."""
    return replace(child, classes={**outer.classes, **child.classes})


def fused_role(roles: tuple[str, ...]) -> str:
    """The role, and attribute name, of the module with the fused matrix of a group."""
    return GROUPS[roles].rpartition(".")[2]


def with_fused(tree: ModuleSpec, groups: Iterable[tuple[str, ...]]) -> ModuleSpec:
    """The tree with each of these groups of sibling modules replaced by one fused module."""
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
    """(role, the `classes` in effect there) of all leaf modules."""
    for child in tree.children.values():
        if isinstance(child, ModuleSpec):
            yield from classes_of(with_outer_classes(child, tree))
        else:
            yield child, tree.classes


def class_tree(
    name: str, bare: ModuleSpec, prefix: str, heads: Mapping[str, str | ModuleSpec], kind: str | None
) -> ModuleSpec:
    """The module tree of the class `name` with a head of that kind: the bare model under `prefix` next to the modules
    of the head, or the bare model itself. It includes the pooler only if the head is or needs one."""
    pooled = kind in ("pooler", "choice")
    kept = {
        n: c
        for n, c in bare.children.items()
        if pooled or not (isinstance(c, ModuleSpec) and c.kind == "pooler")
    }
    bare = replace(bare, children=kept)
    return bare if kind in (None, "pooler") else ModuleSpec(name, "head", {prefix: bare, **heads})
