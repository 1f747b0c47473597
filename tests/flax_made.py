"""JAX models with the weights of a PyTorch one, without any file: the bare Linen network and its parameters."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from helpers import canonical as canonical_tensors

from monoblock.backends.flax.network import Network
from monoblock.backends.xla.inputs import AT_REST, Wanted

TABLES = ("embed", "pos_embed", "rel_bias")


def leaf(canonical: str) -> tuple[tuple[str, ...], bool]:
    """Where a canonical parameter stands in the tree, and whether it is transposed there."""
    *path, last = canonical.split(".")
    if last == "bias":
        return (*path, last), False
    if "norm" in path[-1]:
        return (*path, "scale"), False
    return (*path, "embedding" if path[-1] in TABLES else "kernel"), path[-1] not in TABLES


def arrays_of(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Canonical tensors as the nested tree of JAX arrays."""
    tree: dict[str, Any] = {}
    for canonical, tensor in tensors.items():
        (*path, last), turned = leaf(canonical)
        place = functools.reduce(lambda held, name: held.setdefault(name, {}), path, tree)
        array = tensor.detach().numpy()
        place[last] = jnp.asarray(array.T if turned else array)
    return tree


def canonical_of(tree: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A nested tree of arrays (gradients, say) by canonical name, laid as PyTorch has them."""
    found = {}
    for canonical in names:
        path, turned = leaf(canonical)
        array = np.asarray(functools.reduce(lambda held, name: held[name], path, tree))
        found[canonical] = array.T if turned else array
    return found


def network_of(module: Any) -> tuple[Network, dict[str, Any]]:
    """The network and the parameters of a PyTorch model."""
    return Network(module.spec, head_spec=module.head_spec), arrays_of(canonical_tensors(module))


@functools.partial(jax.jit, static_argnums=(0, 4))
def run(network: Network, params: Any, given: Any, cache: Any = None, wanted: Wanted = AT_REST) -> Any:
    """The network, compiled."""
    return network.apply({"params": params}, given, cache, wanted)


def given(**tensors: torch.Tensor | None) -> dict[str, Any]:
    """PyTorch tensors as the network's inputs; None is left out."""
    return {name: jnp.asarray(x.numpy()) for name, x in tensors.items() if x is not None}
