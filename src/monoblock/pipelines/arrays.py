"""The adapter between the pipelines, which work on lists and NumPy arrays, and the framework of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


class PipelineBackend(Protocol):
    """Runs a model of one framework on lists of rows and returns NumPy arrays."""

    model: Any
    accepts: frozenset[str]  # names of the model's inputs

    @property
    def device(self) -> Any:
        """The model's device."""
        ...

    @property
    def dtype(self) -> Any:
        """The dtype of the model's computation."""
        ...

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """The model's output for these rows of equal length, without a cache.

        It may have padding rows and positions after the given ones.
        """
        ...

    def generate(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> list[list[int]]:
        """The ids that the model's `generate` returns, one row for each sequence."""
        ...

    def numpy(self, array: Any) -> np.ndarray:
        """An output as NumPy, float32."""
        ...

    def native(self, array: np.ndarray) -> Any:
        """A NumPy array as an array of the framework, in the model's dtype."""
        ...


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis."""
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), elementwise."""
    return 1 / (1 + np.exp(-scores))
