"""Conversion of a call's arguments to arrays, and their validation. Traced arrays have no values to check."""

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
    """The value as a JAX or NumPy array; ValueError if it cannot be converted."""
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
    """Convert and check arguments (None: not given); ValueError if one does not fit. See `xla/checked.py`."""
    given = {
        name: _patch_arrays(value) if name in PATCHES else as_array(name, value)
        for name, value in arguments.items()
        if value is not None
    }
    if cache is not None and spec.causal and not isinstance(cache, Cache):
        raise ValueError(
            f"past_key_values must come from init_cache(batch, max_length) or an output, got {type(cache).__name__}"
        )
    return shared.check_inputs(XP, spec, head, given, cache, train=train, documents=documents)


def _patch_arrays(value: Any) -> Any:
    """Image patches as one array, or as a list of one array per row."""
    one_by_one = isinstance(value, list | tuple) and all(hasattr(own, "shape") for own in value)
    return (
        [as_array("image_patches", own) for own in value] if one_by_one else as_array("image_patches", value)
    )
