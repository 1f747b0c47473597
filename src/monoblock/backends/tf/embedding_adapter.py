"""The interface of sentence embeddings to TensorFlow: hidden states of texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from monoblock.backends.tf.pipeline_adapter import Adapter, found_device
from monoblock.backends.xla.embeddings import HostPooling


class EmbeddingAdapter(Adapter, HostPooling):
    """Runs a TF model on lists of ids."""

    tensors = "tf"  # return_tensors of the tokenizer

    def __init__(self, model: Any) -> None:
        super().__init__(model, None)

    def to(self, device: Any) -> None:
        """None leaves the model; ValueError for another device than its own, as Keras cannot move weights."""
        if device is not None and found_device(device) != self.device:
            raise ValueError(
                f"device={device!r}, but the model's weights are on {self.device}, and Keras cannot move them: load "
                "the model with device="
            )

    def tensor(self, array: np.ndarray) -> Any:
        """A NumPy array as a tensor."""
        return tf.convert_to_tensor(array)

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """The model's parameters by name."""
        return ((weight.path, weight) for weight in self.model.weights)
