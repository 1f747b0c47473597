"""Weights from a checkpoint's files into a model's variables, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import keras
import ml_dtypes
import numpy as np

from monoblock.checkpoint.fitting import Report, fitted
from monoblock.checkpoint.keymap import KeyMap
from monoblock.checkpoint.weights import Tensors

Array = np.ndarray[Any, Any]
DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float64": np.float64,
}
STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# A Keras variable's name -> what the canonical tree calls it. Kernels are (inputs, outputs): the tree's, transposed.
CANONICAL = {"kernel": "weight", "embeddings": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"}


def turned(variable: Any) -> bool:
    """Whether a variable has the other axis first."""
    return variable.name == "kernel"


def chosen_dtype(asked: Any, configured: str | None, tensors: Tensors) -> Any:
    """The dtype or Keras policy to load in. "auto" and None: Keras's global policy if it is not the plain one, else
    the config's dtype, else that of the first float tensor in the files."""
    if isinstance(asked, keras.DTypePolicy):
        return asked
    if asked not in (None, "auto"):
        name = str(getattr(asked, "name", asked)).removeprefix("torch.")
        if name not in (*DTYPES, "mixed_float16", "mixed_bfloat16"):
            raise ValueError(
                f"dtype must be 'auto', a Keras policy or one of {', '.join(DTYPES)}, got {asked!r}"
            )
        return name
    policy = keras.config.dtype_policy()
    if policy.name != "float32":
        return policy
    if configured in DTYPES:
        return configured
    return next((STORED[kind] for key in tensors if (kind := tensors.dtype(key)) in STORED), "float32")


def load(
    variables: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    keymap: KeyMap,
    tensors: Tensors,
    tied: Iterable[str],
    *,
    ignore_mismatched_sizes: bool = False,
) -> Report:
    """Fill the variables, given by canonical name, from tensors by the hub's names; what was found and what not.

    MissingKeys, UnexpectedKeys, UnreadKeys and ShapeMismatch name the first tensor that does not fit.
    """
    weights, report = fitted(tensors, keymap, shapes, tied, ignore_mismatched_sizes=ignore_mismatched_sizes)
    for canonical in weights.shapes():
        variable, array = variables[canonical], np.asarray(weights.read(canonical))
        array = array.T if turned(variable) else array
        variable.assign(np.ascontiguousarray(array, dtype=DTYPES[variable.dtype]))
    return report
