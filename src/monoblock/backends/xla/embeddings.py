"""What the embedding adapters of JAX and TensorFlow share: hidden states become NumPy arrays, pooled on the host."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from monoblock.embeddings.arrays import HOST


class HostPooling:
    """Mixin of a pipeline adapter, whose `run` may return padding rows and positions after the given ones."""

    ops = HOST
    on_host = True
    accepts: frozenset[str]
    model: Any

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """The model's output."""
        raise NotImplementedError

    def numpy(self, array: Any) -> np.ndarray:
        """An output as NumPy."""
        raise NotImplementedError

    def cast(self, dtype: Any) -> None:
        """ValueError: the dtype is set when the model is loaded."""
        raise ValueError(
            f"the dtype of this framework's models cannot be changed to {dtype}: load with dtype="
        )

    def train(self, mode: bool) -> None:
        """ValueError for True: dropout is an argument of the model's call."""
        if mode:
            raise ValueError("this framework's models have no training mode: it is an argument of their call")

    def packed(self, ids: Sequence[Sequence[int]]) -> None:
        """None: texts are padded."""
        del ids

    def padded(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """The hidden states [texts, tokens, width] of rows of equal length."""
        rows, count = np.shape(inputs["input_ids"])
        return self.numpy(self.run(inputs)[0])[:rows, :count]

    def logits(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """The first output [texts, labels] of a model with a head."""
        return self.numpy(self.run(inputs)[0])[: len(inputs["input_ids"])]

    def outputs(self, features: Mapping[str, Any]) -> list[np.ndarray]:
        """The model's first output for these features."""
        inputs = {name: np.asarray(value) for name, value in features.items() if name in self.accepts}
        headed = self.model.row.head in ("sequence", "first")
        return [self.logits(inputs) if headed else self.padded(inputs)]

    @staticmethod
    def without_gradients() -> Any:
        """No context: the other modules run in NumPy."""
        return contextlib.nullcontext()

    def tensor(self, array: np.ndarray) -> Any:
        """A NumPy array as an array of the framework."""
        raise NotImplementedError

    @staticmethod
    def devices() -> list[str]:
        """The devices of a new pool of processes: two on the CPU."""
        return ["cpu"] * 2

    @staticmethod
    def limit_threads(count: int) -> None:
        """Nothing: the number of threads is fixed at import."""
        del count
