"""The adapter between the pipelines, which work on lists and NumPy, and the framework of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


class Adapter(Protocol):
    """Runs a model of one framework on lists of rows, and gives NumPy arrays back."""

    model: Any
    accepts: frozenset[str]  # the inputs that the model's call takes

    @property
    def device(self) -> Any:
        """Where the model is."""
        ...

    @property
    def dtype(self) -> Any:
        """The type that the model computes in."""
        ...

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """The model's output for these rows, of one length; no cache is kept.

        It may have more rows and more places, after those that were given.
        """
        ...

    def generate(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> list[list[int]]:
        """The ids that the model's `generate` gives, one row for each sequence."""
        ...

    def numpy(self, array: Any) -> np.ndarray:
        """An output as NumPy, float32."""
        ...

    def native(self, array: np.ndarray) -> Any:
        """A NumPy array as the framework's, in the model's type."""
        ...


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis."""
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), element by element."""
    return 1 / (1 + np.exp(-scores))
