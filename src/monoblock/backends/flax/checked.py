"""A call's arguments on JAX: as arrays, and checked. What is traced (under `jit`, `grad`, `vmap`) has no values."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from monoblock.backends.flax.cache import Cache
from monoblock.backends.flax.namespace import XP
from monoblock.backends.xla import checked as shared
from monoblock.backends.xla.checked import CheckedInputs
from monoblock.heads import HeadSpec
from monoblock.spec import ArchSpec

PATCHES = ("image_patches", "pixel_values")


def as_array(name: str, value: Any) -> Any:
    """A JAX or NumPy array; ValueError for what cannot be one."""
    if isinstance(value, jax.Array):
        return value
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} must be an array, or nested lists of equal lengths") from error
    if array.dtype == object:
        raise ValueError(f"{name} must be an array of numbers, got {type(value).__name__}")
    return array


def check_inputs(
    spec: ArchSpec,
    head: HeadSpec | None,
    arguments: dict[str, Any],
    cache: Any,
    train: bool,
    *,
    documents: bool = True,
) -> CheckedInputs:
    """The arguments (None where one was not given) as the network takes them; ValueError says what is wrong. See
    `xla/checked.py`."""
    given = {
        name: _sets(value) if name in PATCHES else as_array(name, value)
        for name, value in arguments.items()
        if value is not None
    }
    if cache is not None and spec.causal and not isinstance(cache, Cache):
        raise ValueError(
            f"past_key_values must be what init_cache(batch, max_length) or an output holds, got {type(cache).__name__}"
        )
    return shared.check_inputs(XP, spec, head, given, cache, train=train, documents=documents)


def _sets(value: Any) -> Any:
    """Image patches as one array, or a list with an array for each row."""
    one_by_one = isinstance(value, list | tuple) and all(hasattr(own, "shape") for own in value)
    return (
        [as_array("image_patches", own) for own in value] if one_by_one else as_array("image_patches", value)
    )
