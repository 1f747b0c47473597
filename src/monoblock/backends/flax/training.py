"""Training methods of Flax models: losses, dropout keys, gradient checkpointing."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from monoblock.backends.flax import explicit, heads
from monoblock.backends.flax.checked import as_array
from monoblock.backends.flax.outputs import FlaxModelOutput
from monoblock.backends.xla.checked import dropout_rates

if TYPE_CHECKING:
    from monoblock.backends.flax.network import Network
    from monoblock.config import PretrainedConfig
    from monoblock.spec import ArchSpec


class Training:
    """Training methods of a model."""

    config: PretrainedConfig
    spec: ArchSpec
    module: Network

    def updated_module(self) -> Network:
        """The module, with its head updated from the current config."""
        head = self.module.head_spec
        if head is not None and (now := self.config.updated_head(head)) is not head:
            self.module = self.module.clone(head_spec=now)
        return self.module

    def compute_losses(self, outputs: FlaxModelOutput, **labels: Any) -> dict[str, jax.Array]:
        """The losses of a call's outputs by name: `loss`, and `mc_loss` of a double head.

        `labels`, as in transformers' PyTorch classes: labels (batch, tokens), with -100 ignored, or (batch,), or floats
        (batch, labels); start_positions and end_positions; mc_labels; num_items_in_batch, which replaces the number of
        labels as the divisor of the sum. Differentiable; works under `jit`.
        """
        head = self.updated_module().head_spec
        if head is None:
            raise ValueError(f"{type(self).__name__} has no head, so no loss")
        known = (*heads.KINDS[head.kind].labels, "num_items_in_batch")
        if unknown := [name for name in labels if name not in known]:
            raise TypeError(
                f"the losses of {type(self).__name__} take {', '.join(known)}, got {unknown[0]!r}"
            )
        given = {
            name: jnp.asarray(as_array(name, value)) for name, value in labels.items() if value is not None
        }
        found = dict(outputs.items())
        if (mesh := explicit.explicit(found, given)) is None:
            return heads.losses(head, found, given)
        return explicit.run(mesh, partial(heads.losses, head), (found, given), explicit.Layout(mesh))

    def compute_loss(self, outputs: FlaxModelOutput, **labels: Any) -> jax.Array:
        """The sum of `compute_losses`, a scalar to differentiate.

        def loss(params):
            return model.compute_loss(model(input_ids, params=params), labels=input_ids)
        """
        return jnp.asarray(sum(self.compute_losses(outputs, **labels).values()))

    def dropout_key(self, key: jax.Array | None) -> jax.Array | None:
        """The dropout key of a training step; ValueError if the model has dropout and the key is None."""
        if key is None and any(dropout_rates(self.spec, self.module.head_spec)):
            raise ValueError(
                "train=True applies dropout: give dropout_rng, a new key for each step (jax.random.split)"
            )
        return key

    def enable_gradient_checkpointing(self) -> None:
        """In training, store only each block's input and recompute activations in the backward pass."""
        self.module = self.module.clone(remat=True)

    # The same under the name of the PyTorch classes.
    gradient_checkpointing_enable = enable_gradient_checkpointing

    def gradient_checkpointing_disable(self) -> None:
        """Store all activations."""
        self.module = self.module.clone(remat=False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return self.module.remat
