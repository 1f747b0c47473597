"""Linen networks with the weights of PyTorch models, converted in memory."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from monoblock.backends.flax import loading
from monoblock.backends.flax.network import Network
from monoblock.backends.xla.inputs import DEFAULT_OPTIONS, ForwardOptions


def canonical_of(tree: Mapping[str, Any], model: Any) -> dict[str, np.ndarray]:
    """A tree of arrays (parameters, gradients) by canonical name, in PyTorch's layout."""
    found, leaves = {}, loading.flat(tree)
    for canonical, group in model.groups.items():
        found[canonical] = np.empty(model.canonical_shapes()[canonical], np.float32)
        for view, leaf in zip(group.op.views(found[canonical]), group.leaves, strict=True):
            view[...] = leaf.convert(np.asarray(leaves[leaf.path])).reshape(view.shape)
    return found


def network_of(module: Any) -> tuple[Network, dict[str, Any]]:
    """The network and the parameters of a PyTorch model."""
    layout, leaves = module.family.layout(module.config, module.row), {}
    for group in loading.groups(module.keymap(), module.shapes(), layout).values():
        for leaf in group.leaves:
            leaves[leaf.path] = jnp.asarray(leaf.convert(module.get_parameter(leaf.name).detach().numpy()))
    return Network(layout, module.spec, module.head_spec), loading.nested(leaves)


@functools.partial(jax.jit, static_argnums=(0, 4))
def run(
    network: Network, params: Any, given: Any, cache: Any = None, options: ForwardOptions = DEFAULT_OPTIONS
) -> Any:
    """`Network.run` under `jax.jit`."""
    return network.apply({"params": params}, given, cache, options, method="run")


def given(**tensors: torch.Tensor | None) -> dict[str, Any]:
    """PyTorch tensors as the network's inputs; None is left out."""
    return {name: jnp.asarray(x.numpy()) for name, x in tensors.items() if x is not None}
