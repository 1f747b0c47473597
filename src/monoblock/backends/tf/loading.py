"""Loading of a checkpoint's tensors into a model's variables, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import ml_dtypes
import numpy as np

from monoblock.backends.tf.layers import Conv1D
from monoblock.checkpoint.keymap import KeyMap
from monoblock.checkpoint.matching import LoadReport, match_weights
from monoblock.checkpoint.weights import Tensors, lazy_tensors

Array = np.ndarray[Any, Any]
DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float64": np.float64,
}
STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# A variable's name -> the name in files.
IN_FILES = {
    "kernel": "weight",
    "embeddings": "weight",
    "gamma": "weight",
    "weight": "weight",
    "bias": "bias",
    "beta": "bias",
}


@dataclass(frozen=True)
class StoredVariable:
    """A variable of a layer, and its layout in files: matrices are outputs x inputs (except Conv1D's), biases have one
    axis."""

    layer: Any
    variable: Any

    @property
    def transposed(self) -> bool:
        """Whether the variable is transposed in files."""
        return isinstance(self.layer, keras.layers.Dense) and not isinstance(self.layer, Conv1D)

    def convert(self, values: Array) -> Array:
        """Convert values between the layout of files and that of the variable; its own inverse."""
        if IN_FILES[self.variable.name] == "bias":
            return values.reshape(-1)
        return values.T if self.transposed else values

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in files."""
        shape = tuple(self.variable.shape)
        if IN_FILES[self.variable.name] == "bias":
            return shape[-1:]
        return shape[::-1] if self.transposed else shape

    def read(self) -> Array:
        """The values in the layout of files, with adapters (`enable_lora`) merged."""
        value: Any = self.variable
        if IN_FILES[value.name] == "weight" and isinstance(self.layer, keras.layers.Dense):
            value = self.layer.kernel
        elif isinstance(self.layer, keras.layers.Embedding):
            value = self.layer.embeddings
        return self.convert(np.asarray(value.numpy() if hasattr(value, "numpy") else value))

    def assign(self, values: Array) -> None:
        """Assign values in the layout of files."""
        values = self.convert(np.asarray(values)).reshape(self.variable.shape)
        self.variable.assign(np.ascontiguousarray(values, dtype=DTYPES[self.variable.dtype]))


def stored_variables(layer: Any, name: str) -> dict[str, StoredVariable]:
    """The variables of a layer itself, by their names in files; `name` is the layer's name in files."""
    variables = [*layer._trainable_variables, *layer._non_trainable_variables]
    return {f"{name}.{IN_FILES[v.name]}": StoredVariable(layer, v) for v in variables if v.name in IN_FILES}


def chosen_dtype(requested: Any, configured: str | None, tensors: Tensors) -> Any:
    """The dtype or Keras policy of a load. "auto" and None: Keras's global policy if it is not float32, else the
    config's dtype, else that of the first floating-point tensor in the files."""
    if isinstance(requested, keras.DTypePolicy):
        return requested
    if requested not in (None, "auto"):
        name = str(getattr(requested, "name", requested)).removeprefix("torch.")
        if name not in (*DTYPES, "mixed_float16", "mixed_bfloat16"):
            raise ValueError(
                f"dtype must be 'auto', a Keras policy or one of {', '.join(DTYPES)}, got {requested!r}"
            )
        return name
    policy = keras.config.dtype_policy()
    if policy.name != "float32":
        return policy
    if configured in DTYPES:
        return configured
    return next((STORED[kind] for key in tensors if (kind := tensors.dtype(key)) in STORED), "float32")


def load(
    found: Mapping[str, StoredVariable],
    shapes: Mapping[str, tuple[int, ...]],
    keymap: KeyMap,
    tensors: Tensors,
    tied: Iterable[str],
    *,
    ignore_mismatched_sizes: bool = False,
    strict: bool = True,
) -> LoadReport:
    """Assign variables, given by their names in files, from tensors; report missing and unused ones. `shapes`: those of
    the canonical parameters.

    MissingKeys, UnexpectedKeys, UnreadKeys and ShapeMismatch name the first tensor that does not fit.
    """
    weights, report = match_weights(
        tensors, keymap, shapes, tied, ignore_mismatched_sizes=ignore_mismatched_sizes, strict=strict
    )
    for name, made in lazy_tensors(weights, keymap).items():
        found[name].assign(made())
    return report
