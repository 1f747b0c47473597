"""Image patches of a call: all of the batch in one tensor, and for each token the one that is its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from monoblock.backends.tf.ops import Size, Tensor, size
from monoblock.spec import Patches

NAMES = ("image_patches", "image_patches_indices", "pixel_values")


def patches(
    layout: Patches | None, images: Mapping[str, Any], input_ids: Tensor | None, count: Size
) -> dict[str, Tensor]:
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
    indices = images.get("image_patches_indices")
    joined, lengths = _joined(value, layout.size)
    if indices is None:
        rows = _in_order(joined, input_ids, layout.token_id)
    else:
        rows = _by_index(lengths, tf.cast(indices, tf.int32)[:, -count:], input_ids)
    return {"image_patches": joined, "patch_rows": rows}


def _joined(value: Any, width: int) -> tuple[Tensor, Any]:
    """All patches (P, size), and how many each set of them has: those of a row, or all of them."""
    sets = list(value) if isinstance(value, list | tuple) else [value]
    for own in sets:
        if own.shape[-1] != width:
            raise ValueError(f"image patches must be (.., {width}), got {tuple(own.shape)}")
    if len(sets) == 1 and len(sets[0].shape) == 3:
        lengths = tf.fill((size(sets[0], 0),), size(sets[0], 1))
        return tf.reshape(sets[0], (-1, width)), lengths
    sets = [tf.reshape(own, (-1, width)) for own in sets]
    return tf.concat(sets, axis=0), tf.stack([size(own, 0) for own in sets])


def _in_order(joined: Tensor, ids: Tensor, token_id: int) -> Tensor:
    is_patch = tf.cast(tf.reshape(ids == token_id, (-1,)), tf.int32)
    if tf.executing_eagerly() and int(size(joined, 0)) != (count := int(tf.reduce_sum(is_patch))):
        raise ValueError(
            f"{int(size(joined, 0))} image patches came for {count} tokens of the id {token_id}: without "
            "image_patches_indices there must be as many"
        )
    return tf.reshape(is_patch * tf.cumsum(is_patch) - 1, tf.shape(ids))


def _by_index(lengths: Any, indices: Tensor, ids: Tensor) -> Tensor:
    sets, rows = size(lengths, 0), ids.shape[0]
    if isinstance(sets, int) and rows is not None and sets != rows:
        raise ValueError(f"image_patches must hold one set for each of the {rows} rows, got {sets}")
    if not indices.shape.is_compatible_with(ids.shape):
        raise ValueError(
            f"image_patches_indices must be (batch, tokens) = {tuple(ids.shape)}, got {tuple(indices.shape)}"
        )
    if tf.executing_eagerly():
        for row, (needed, came) in enumerate(
            zip(np.asarray(indices).max(-1) + 1, np.asarray(lengths), strict=True)
        ):
            if needed > came:
                raise ValueError(f"row {row} has places for {needed} image patches, but {came} came")
    before = (tf.cumsum(lengths) - lengths)[:, None]
    return tf.where(indices >= 0, indices + before, -1)
