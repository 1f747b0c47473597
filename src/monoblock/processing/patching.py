"""The patch grid of an image, its placeholder ids, and the patch index of each id."""

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

# The keys of `tokenizer_info`, which are the model_input_names of transformers' image processor.
OUTPUTS = (
    "images",
    "image_input_ids",
    "image_patches",
    "image_patch_indices_per_batch",
    "image_patch_indices_per_subsequence",
)
_ROOTS = {"torch": "pt", "jax": "jax", "jaxlib": "jax", "tensorflow": "tf"}


def grid(height: int, width: int, patch: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of patches; ValueError unless the image consists of whole patches."""
    for name, length, side in (("height", height, patch[0]), ("width", width, patch[1])):
        if length % side:
            raise ValueError(
                f"image_{name}={length} must be divisible by the patch's {name} {side}: leave do_pad on, and use a "
                "size of whole patches"
            )
    return height // patch[0], width // patch[1]


def round_up(length: int, unit: int, limit: int | None = None) -> int:
    """`length` rounded up to a multiple of `unit` (pixels of a patch), but to no more than `limit`."""
    rounded = math.ceil(length / unit) * unit
    return rounded if limit is None else min(limit, rounded)


def placeholders(rows: int, columns: int, placeholder: int, newline: int | None) -> tuple[Ids, Ids]:
    """The ids of an image, one per patch and a newline after each row, and the patch index of each id (-1: none)."""
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
        unpadded: heights and widths [batch, images] without padding; None keeps the padding, without newlines.
        ids: of the placeholder and of the newline.
    """
    data: dict[str, list[Any]] = {name: [] for name in OUTPUTS}
    for row, images in enumerate(batch):
        sample: dict[str, list[Any]] = {name: [] for name in OUTPUTS[1:]}
        before = 0
        for column, image in enumerate(images):
            if not present[row, column]:
                for name in ("image_input_ids", *OUTPUTS[3:]):
                    sample[name].append(np.zeros(0, np.int32))
                continue
            if unpadded is not None:
                sizes = [int(lengths[row, column]) for lengths in unpadded]
                kept = list(map(round_up, sizes, patch, image.shape[1:]))
                image = image[:, : kept[0], : kept[1]]
            rows, columns = grid(image.shape[1], image.shape[2], patch)
            input_ids, indices = placeholders(rows, columns, ids[0], None if unpadded is None else ids[1])
            data["images"].append([image])
            sample["image_input_ids"].append(input_ids.astype(np.int32))
            sample["image_patches"].append(pixels.patches(np.moveaxis(image, 0, -1), patch))
            sample["image_patch_indices_per_subsequence"].append(indices.astype(np.int32))
            shifted = np.where(indices < 0, -1, indices + before)
            sample["image_patch_indices_per_batch"].append(shifted.astype(np.int32))
            before += rows * columns
        for name, values in sample.items():
            data[name].append(values)
    return data


def to_numpy(value: Any) -> Pixels:
    """An array of any framework, or nested lists of numbers, as a NumPy array."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def like(example: Any) -> Callable[[Any], Any]:
    """A function from NumPy arrays, also in lists, to arrays of the framework and device of `example`."""
    framework = _ROOTS.get(type(example).__module__.partition(".")[0])
    convert = cast("Callable[[Any], Any]", array_converter(framework) if framework else np.asarray)

    def back(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [back(item) for item in cast("Sequence[Any]", value)]
        converted = convert(value)
        return converted.to(example.device) if framework == "pt" else converted

    return back
