"""Matrices that multiply the same input as one matrix each, for long loops over tokens.

Products of one token with small matrices take much of their time to start: at a width of 768 on two CPU cores, q, k
and v one after the other take twice the time of one product with all of them (0.16 s and 0.08 s for 64 tokens in 12
layers). Joining them copies them, which takes the time that some 64 tokens save.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import Array

from monoblock.backends.flax.loading import Tree
from monoblock.backends.flax.network import Network
from monoblock.modules import GROUPS, ModuleSpec, fused_role, with_fused

LONG = 128  # new tokens from which joining pays
# Bytes of one group's matrices: the time of larger products is that of reading them, and a copy takes memory.
LARGEST = 16 * 2**20

Roles = tuple[str, ...]


def joined(network: Network, params: Mapping[str, Any]) -> tuple[Network, Mapping[str, Any]]:
    """The same network with joint matrices and a tree of parameters for it; both as they are where there is nothing to
    join, or the parameters are split over devices or traced."""
    leaves = jax.tree.leaves(params)
    if any(isinstance(x, jax.core.Tracer) or not _whole(x) for x in leaves):
        return network, params
    size = max(jnp.result_type(x).itemsize for x in leaves)
    groups = tuple(roles for roles in GROUPS if 0 < _numbers(network, roles) * size <= LARGEST)
    found: list[tuple[Any, ...]] = []
    _collect(network.layout, params, groups, found)
    if not found:
        return network, params
    made = iter(_concatenated(found))
    layout = with_fused(network.layout, groups)
    return network.clone(layout=layout), _replaced(network.layout, params, groups, made)


def _whole(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.sharding.is_fully_replicated


def _numbers(network: Network, roles: Roles) -> int:
    """How many numbers the matrices of a group have in one layer; 0 if the model has no such group."""
    att, mlp, width = network.spec.attention, network.spec.mlp, network.spec.width
    if roles == ("gate", "up"):
        return 2 * mlp.width * width if mlp.gated else 0
    return (att.heads + 2 * att.kv_heads) * att.head_dim * width


@jax.jit
def _concatenated(groups: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Each group's modules as one: kernels (inputs, outputs) and biases (outputs,) one after the other."""

    def along(*leaves: Array) -> Array:
        return jnp.concatenate(leaves, axis=-1)

    return [jax.tree.map(along, *modules) for modules in groups]


def _collect(
    layout: ModuleSpec, params: Mapping[str, Any], groups: Sequence[Roles], found: list[Any]
) -> None:
    for inner, node in _parts(layout, params):
        _collect(inner, node, groups, found)
    for roles in groups:
        if names := _names(layout, roles):
            found.append(tuple(params[name] for name in names))


def _replaced(layout: ModuleSpec, params: Mapping[str, Any], groups: Sequence[Roles], made: Any) -> Tree:
    """The tree with the joint modules, in the order of `_collect`."""
    tree = dict(params)
    for name, child in layout.children.items():
        if isinstance(child, ModuleSpec) and name in params:
            node = params[name]
            tree[name] = (
                {number: _replaced(child, layer, groups, made) for number, layer in node.items()}
                if child.kind == "layer"
                else _replaced(child, node, groups, made)
            )
    for roles in groups:
        if names := _names(layout, roles):
            tree = {name: node for name, node in tree.items() if name not in names}
            tree[fused_role(roles)] = next(made)
    return tree


def _parts(layout: ModuleSpec, params: Mapping[str, Any]) -> list[tuple[ModuleSpec, Mapping[str, Any]]]:
    """The parts below, with their parameters; a list of layers as many."""
    found: list[tuple[ModuleSpec, Mapping[str, Any]]] = []
    for name, child in layout.children.items():
        if isinstance(child, ModuleSpec) and name in params:
            nodes = params[name].values() if child.kind == "layer" else (params[name],)
            found += [(child, node) for node in nodes]
    return found


def _names(layout: ModuleSpec, roles: Roles) -> tuple[str, ...] | None:
    """The names of the modules that play these roles here; None unless all are here."""
    names = {child: name for name, child in layout.children.items() if isinstance(child, str)}
    return tuple(names[role] for role in roles) if all(role in names for role in roles) else None
