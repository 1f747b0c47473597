"""Image patches of a call: all of the batch in one array, and for each token the one that is its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monoblock.backends.xla.namespace import Array, Namespace, Size, fits, known, shown
from monoblock.spec import Patches

NAMES = ("image_patches", "image_patches_indices", "pixel_values")


def patches(
    xp: Namespace,
    layout: Patches | None,
    images: Mapping[str, Any],
    ids: Array | None,
    shape: tuple[Size, Size],
) -> dict[str, Array]:
    """image_patches (P, size) and patch_rows (batch, tokens), which of them each token is, -1 for none.

    `images`: image_patches or pixel_values, its other name: (n, size) for each row of the batch with
    image_patches_indices (batch, tokens), which of its row's patches each token is; without, all patches of the batch
    in order, which the tokens of the patch id take one after the other. `ids` have the `shape` (batch, tokens).
    """
    if "image_patches" in images and "pixel_values" in images:
        raise ValueError("image_patches and pixel_values are two names of the same patches: give one")
    value = images.get("image_patches", images.get("pixel_values"))
    if value is None:
        raise ValueError("image_patches_indices say where image_patches go, but none came")
    if layout is None:
        raise ValueError("image patches were given, but the model takes text alone")
    if ids is None:
        raise ValueError("image patches replace the tokens of their id: give input_ids, not inputs_embeds")
    joined, counts = _joined(xp, value, layout.size)
    if (indices := images.get("image_patches_indices")) is None:
        rows = _in_order(xp, joined, ids, layout.token_id)
    else:
        rows = _by_index(xp, counts, xp.int32(indices)[:, -shape[1] :], shape)
    return {"image_patches": joined, "patch_rows": xp.int32(rows)}


def _joined(xp: Namespace, value: Any, width: int) -> tuple[Array, list[Size] | Array]:
    """All patches (P, width), and how many each set of them has: those of a row, or all of them."""
    sets = list(value) if isinstance(value, list | tuple) else [value]
    for own in sets:
        if len(own.shape) < 1 or own.shape[-1] != width:
            raise ValueError(f"image patches must be (.., {width}), got {tuple(own.shape)}")
    if len(sets) == 1 and len(sets[0].shape) == 3:
        rows, count = xp.size(sets[0], 0), xp.size(sets[0], 1)
        return xp.reshape(sets[0], (-1, width)), [count] * rows if known(rows) else xp.full((rows,), count)
    sets = [xp.reshape(own, (-1, width)) for own in sets]
    return xp.stacked(sets), [xp.size(own, 0) for own in sets]


def _in_order(xp: Namespace, joined: Array, ids: Array, token_id: int) -> Array:
    is_patch = xp.reshape(ids == token_id, (-1,))
    came, values = xp.size(joined, 0), xp.values(is_patch)
    if values is not None and known(came) and came != (count := int(values.sum())):
        raise ValueError(
            f"{came} image patches came for {count} tokens of the id {token_id}: without "
            "image_patches_indices there must be as many"
        )
    rows = xp.where(is_patch, xp.cumsum(xp.int32(is_patch)) - 1, -1)
    return xp.reshape(rows, tuple(xp.size(ids, axis) for axis in (0, 1)))


def _by_index(xp: Namespace, counts: list[Size] | Array, indices: Array, shape: tuple[Size, Size]) -> Array:
    sets = len(counts) if isinstance(counts, list) else xp.size(counts, 0)
    if known(sets, shape[0]) and sets != shape[0]:
        raise ValueError(f"image_patches must hold one set for each of the {shape[0]} rows, got {sets}")
    if not fits(indices.shape, *shape):
        raise ValueError(
            f"image_patches_indices must be (batch, tokens) = {shown(*shape)}, got {tuple(indices.shape)}"
        )
    values = xp.values(indices)
    if values is not None and isinstance(counts, list) and known(*counts):
        for row, (needed, came) in enumerate(zip(values.max(-1) + 1, counts, strict=True)):
            if needed > came:
                raise ValueError(f"row {row} has tokens for {needed} image patches, but {came} came")
    counts = xp.int32(counts)
    return xp.where(indices >= 0, indices + (xp.cumsum(counts) - counts)[:, None], -1)
