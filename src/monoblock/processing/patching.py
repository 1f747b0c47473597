"""Where patches stand: the grid of an image, its placeholder ids, and the index of each patch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from monoblock.processing import pixels
from monoblock.processing.batch import array_converter
from monoblock.processing.pixels import Pixels

Ids = NDArray[np.int64]

# What `tokenizer_info` returns, and the hub's image processor names as its outputs.
OUTPUTS = (
    "images",
    "image_input_ids",
    "image_patches",
    "image_patch_indices_per_batch",
    "image_patch_indices_per_subsequence",
)
_ROOTS = {"torch": "pt", "jax": "jax", "jaxlib": "jax", "tensorflow": "tf"}


def grid(height: int, width: int, patch: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of patches; ValueError if the image is not made of whole ones."""
    for name, length, side in (("height", height, patch[0]), ("width", width, patch[1])):
        if length % side:
            raise ValueError(
                f"image_{name}={length} must be divisible by the patch's {name} {side}: leave do_pad on, and give a "
                "size of whole patches"
            )
    return height // patch[0], width // patch[1]


def whole(length: int, unit: int, limit: int | None = None) -> int:
    """`length` rounded up to whole units (pixels of a patch), but to no more than `limit`."""
    rounded = math.ceil(length / unit) * unit
    return rounded if limit is None else min(limit, rounded)


def placeholders(rows: int, columns: int, placeholder: int, newline: int | None) -> tuple[Ids, Ids]:
    """The ids of an image, one per patch and a newline after each row, and the patch of each id (-1: none)."""
    indices = np.arange(rows * columns).reshape(rows, columns)
    if newline is not None:
        indices = np.pad(indices, ((0, 0), (0, 1)), constant_values=-1)
    indices = indices.ravel()
    return np.where(indices < 0, -1 if newline is None else newline, placeholder), indices


def tokenizer_info(
    batch: Pixels,
    present: NDArray[np.bool_],
    unpadded: tuple[Pixels, Pixels] | None,
    ids: tuple[int, int],
    patch: tuple[int, int],
) -> dict[str, list[Any]]:
    """`OUTPUTS` of padded images [batch, images, channels, height, width]; lists per sample, then per image.

    Args:
        present: [batch, images], whether there is an image.
        unpadded: heights and widths [batch, images] to cut the padding off; None keeps whole images, without newlines.
        ids: of the placeholder and of the newline.
    """
    data: dict[str, list[Any]] = {name: [] for name in OUTPUTS}
    for row, images in enumerate(batch):
        parts: dict[str, list[Any]] = {name: [] for name in OUTPUTS[1:]}
        before = 0
        for column, image in enumerate(images):
            if not present[row, column]:
                for name in ("image_input_ids", *OUTPUTS[3:]):
                    parts[name].append(np.zeros(0, np.int32))
                continue
            if unpadded is not None:
                sizes = [int(lengths[row, column]) for lengths in unpadded]
                kept = list(map(whole, sizes, patch, image.shape[1:]))
                image = image[:, : kept[0], : kept[1]]
            rows, columns = grid(image.shape[1], image.shape[2], patch)
            stream, indices = placeholders(rows, columns, ids[0], None if unpadded is None else ids[1])
            data["images"].append([image])
            parts["image_input_ids"].append(stream.astype(np.int32))
            parts["image_patches"].append(pixels.patches(np.moveaxis(image, 0, -1), patch))
            parts["image_patch_indices_per_subsequence"].append(indices.astype(np.int32))
            shifted = np.where(indices < 0, -1, indices + before)
            parts["image_patch_indices_per_batch"].append(shifted.astype(np.int32))
            before += rows * columns
        for name, values in parts.items():
            data[name].append(values)
    return data


def to_numpy(value: Any) -> Pixels:
    """An array of any framework, or nested lists of numbers, as a NumPy array."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def like(example: Any) -> Callable[[Any], Any]:
    """Makes NumPy arrays into arrays of the framework, and on the device, of `example`; reaches into lists."""
    framework = _ROOTS.get(type(example).__module__.partition(".")[0])
    convert = cast("Callable[[Any], Any]", array_converter(framework) if framework else np.asarray)

    def back(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [back(item) for item in cast("Sequence[Any]", value)]
        made = convert(value)
        return made.to(example.device) if framework == "pt" else made

    return back
