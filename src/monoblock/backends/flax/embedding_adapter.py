"""The interface of sentence embeddings to JAX: hidden states of texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from monoblock.backends.flax.pipeline_adapter import Adapter, found_device
from monoblock.backends.xla.embeddings import HostPooling


class EmbeddingAdapter(Adapter, HostPooling):
    """Runs a Flax model on lists of ids."""

    tensors = "jax"  # return_tensors of the tokenizer

    def __init__(self, model: Any) -> None:
        super().__init__(model, None)

    def to(self, device: Any) -> None:
        """Move the parameters; None leaves them."""
        if device is not None:
            self.model.params = jax.device_put(self.model.params, found_device(device))

    def tensor(self, array: np.ndarray) -> jax.Array:
        """A NumPy array as a JAX array."""
        return jnp.asarray(array)

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """The model's parameters by name."""
        for path, value in jax.tree_util.tree_leaves_with_path(self.model.params):
            yield jax.tree_util.keystr(path, simple=True, separator="."), value
