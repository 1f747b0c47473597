"""The forward pass and gradients of every Flax class: the contract."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch
from contract.parity import ParityContract
from flax_networks import canonical_of
from helpers import canonical


class TestParity(ParityContract):
    prefix = "Flax"

    def loss_and_gradients(self, ours: Any, given: Any, wanted: Any) -> tuple[Any, dict[str, np.ndarray]]:
        @jax.jit
        @jax.value_and_grad
        def loss(params: Any) -> jax.Array:
            return ours.compute_loss(ours(**given, params=params), **wanted)

        value, tree = loss(ours.params)
        assert jax.tree.structure(tree) == jax.tree.structure(ours.params)
        return value, canonical_of(tree, ours)

    def torch_gradients(self, theirs: Any) -> dict[str, torch.Tensor]:
        return canonical(theirs, gradients=True)
