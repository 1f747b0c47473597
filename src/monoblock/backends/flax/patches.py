"""Image patches of a call: all of the batch in one array, and for each token the one that is its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from monoblock.spec import Patches


def patches(
    layout: Patches | None, images: Mapping[str, Any], input_ids: Any, shape: tuple[int, int]
) -> dict[str, Any]:
    """image_patches (P, size) and patch_rows (batch, tokens), which of them each token is, -1 for none.

    `images`: image_patches or pixel_values, its other name: (n, size) for each row of the batch with
    image_patches_indices (batch, tokens), which of its row's patches each token is; without, all patches of the batch
    in order, which the tokens of the patch id take one after the other.
    """
    if "image_patches" in images and "pixel_values" in images:
        raise ValueError("image_patches and pixel_values are two names of the same patches: give one")
    value = images.get("image_patches", images.get("pixel_values"))
    if value is None:
        raise ValueError("image_patches_indices say where image_patches go, but none came")
    if layout is None:
        raise ValueError("image patches were given, but the model takes text alone")
    if input_ids is None:
        raise ValueError("image patches go to the places of their ids: give input_ids, not inputs_embeds")
    sets = _sets(value, layout.size)
    xp = np if all(isinstance(own, np.ndarray) for own in sets) else jnp
    indices = images.get("image_patches_indices")
    rows = (
        _in_order(sets, input_ids, layout.token_id)
        if indices is None
        else _by_index(sets, _array(indices)[:, -shape[1] :], shape)
    )
    return {"image_patches": xp.concatenate(sets), "patch_rows": rows.astype(np.int32)}


def _array(value: Any) -> Any:
    return value if isinstance(value, jax.Array) else np.asarray(value)


def _sets(value: Any, size: int) -> list[Any]:
    """Arrays (n, size): one for each row of the batch, or one of all."""
    one_by_one = isinstance(value, list | tuple) and all(hasattr(own, "shape") for own in value)
    if not one_by_one:
        value = _array(value)
        value = [value] if value.ndim == 2 else value
    sets = [_array(own) for own in value]
    for own in sets:
        if own.ndim < 1 or own.shape[-1] != size:
            raise ValueError(f"image patches must be (.., {size}), got {tuple(own.shape)}")
    return [own.reshape(-1, size) for own in sets]


def _in_order(sets: list[Any], ids: Any, token_id: int) -> Any:
    xp = np if isinstance(ids, np.ndarray) else jnp
    is_patch = (ids == token_id).reshape(-1)
    came = sum(len(own) for own in sets)
    if not isinstance(ids, Tracer) and came != (count := int(is_patch.sum())):
        raise ValueError(
            f"{came} image patches came for {count} tokens of the id {token_id}: without "
            "image_patches_indices there must be as many"
        )
    return xp.where(is_patch, xp.cumsum(is_patch) - 1, -1).reshape(ids.shape)


def _by_index(sets: list[Any], indices: Any, shape: tuple[int, int]) -> Any:
    xp = np if isinstance(indices, np.ndarray) else jnp
    if len(sets) != shape[0]:
        raise ValueError(f"image_patches must hold one set for each of the {shape[0]} rows, got {len(sets)}")
    if tuple(indices.shape) != shape:
        raise ValueError(
            f"image_patches_indices must be (batch, tokens) = {shape}, got {tuple(indices.shape)}"
        )
    sizes = np.array([len(own) for own in sets])
    if not isinstance(indices, Tracer):
        for row, needed in enumerate(np.asarray(indices).max(-1) + 1):
            if needed > sizes[row]:
                raise ValueError(f"row {row} has places for {needed} image patches, but {sizes[row]} came")
    return xp.where(indices >= 0, indices + (sizes.cumsum() - sizes)[:, None], -1)
