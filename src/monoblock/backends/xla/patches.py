"""Image patches of a batch: one array of all patches, and the patch of each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monoblock.backends.xla.namespace import Array, Namespace, Size, is_static, shape_text, shapes_match
from monoblock.spec import Patches

NAMES = ("image_patches", "image_patches_indices", "pixel_values")


def patches(
    xp: Namespace,
    layout: Patches | None,
    images: Mapping[str, Any],
    ids: Array | None,
    shape: tuple[Size, Size],
) -> dict[str, Array]:
    """image_patches (P, size) of the whole batch, and patch_rows (batch, tokens): the index of each token's patch, -1
    for text tokens.

    `images`: image_patches, or its alias pixel_values. With image_patches_indices (batch, tokens), the index of each
    token's patch within its row, they are (n, size) for each row; without, all patches of the batch in the order of
    the tokens with the patch id. `ids` have the `shape` (batch, tokens). ValueError if they do not fit.
    """
    if "image_patches" in images and "pixel_values" in images:
        raise ValueError("image_patches and pixel_values are two names of the same input: give one")
    value = images.get("image_patches", images.get("pixel_values"))
    if value is None:
        raise ValueError("image_patches_indices need image_patches")
    if layout is None:
        raise ValueError("image patches were given, but the model takes text only")
    if ids is None:
        raise ValueError("image patches replace the tokens of their id: give input_ids, not inputs_embeds")
    joined, counts = _joined(xp, value, layout.size)
    if (indices := images.get("image_patches_indices")) is None:
        rows = _in_order(xp, joined, ids, layout.token_id)
    else:
        rows = _by_index(xp, counts, xp.int32(indices)[:, -shape[1] :], shape)
    return {"image_patches": joined, "patch_rows": xp.int32(rows)}


def _joined(xp: Namespace, value: Any, width: int) -> tuple[Array, list[Size] | Array]:
    """All patches (P, width), and the number of patches of each set (of one row, or of the batch)."""
    sets = list(value) if isinstance(value, list | tuple) else [value]
    for one in sets:
        if len(one.shape) < 1 or one.shape[-1] != width:
            raise ValueError(f"image patches must be (.., {width}), got {tuple(one.shape)}")
    if len(sets) == 1 and len(sets[0].shape) == 3:
        rows, count = xp.size(sets[0], 0), xp.size(sets[0], 1)
        return xp.reshape(sets[0], (-1, width)), [count] * rows if is_static(rows) else xp.full(
            (rows,), count
        )
    sets = [xp.reshape(one, (-1, width)) for one in sets]
    return xp.stacked(sets), [xp.size(one, 0) for one in sets]


def _in_order(xp: Namespace, joined: Array, ids: Array, token_id: int) -> Array:
    is_patch = xp.reshape(ids == token_id, (-1,))
    total, values = xp.size(joined, 0), xp.values(is_patch)
    if values is not None and is_static(total) and total != (count := int(values.sum())):
        raise ValueError(
            f"{total} image patches for {count} tokens of the id {token_id}: without "
            "image_patches_indices there must be as many"
        )
    rows = xp.where(is_patch, xp.cumsum(xp.int32(is_patch)) - 1, -1)
    return xp.reshape(rows, tuple(xp.size(ids, axis) for axis in (0, 1)))


def _by_index(xp: Namespace, counts: list[Size] | Array, indices: Array, shape: tuple[Size, Size]) -> Array:
    sets = len(counts) if isinstance(counts, list) else xp.size(counts, 0)
    if is_static(sets, shape[0]) and sets != shape[0]:
        raise ValueError(f"image_patches must hold one set for each of the {shape[0]} rows, got {sets}")
    if not shapes_match(indices.shape, *shape):
        raise ValueError(
            f"image_patches_indices must be (batch, tokens) = {shape_text(*shape)}, got {tuple(indices.shape)}"
        )
    values = xp.values(indices)
    if values is not None and isinstance(counts, list) and is_static(*counts):
        for row, (needed, count) in enumerate(zip(values.max(-1) + 1, counts, strict=True)):
            if needed > count:
                raise ValueError(f"row {row} has tokens for {needed} image patches, but {count} were given")
    counts = xp.int32(counts)
    return xp.where(indices >= 0, indices + (xp.cumsum(counts) - counts)[:, None], -1)
