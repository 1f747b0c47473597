"""Images as NumPy arrays: conversion to RGB, resizing, padding, normalisation and patches.

Inside this module an image is [height, width, 3], the layout of Pillow and of Fuyu's patches.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[Any]
Layout = Literal["channels_first", "channels_last"]

log = logging.getLogger("monoblock")

# transformers' names of padding modes -> NumPy's.
PAD_MODES = {
    "constant": "constant",
    "edge": "edge",
    "replicate": "edge",
    "reflect": "reflect",
    "symmetric": "symmetric",
}
_WIDE_MODES = ("I", "F")  # Pillow's modes with more than 8 bits; conversion to RGB would clip them to white
_CHANNELS = (1, 3, 4)


def pillow(module: str = "Image") -> Any:
    """A module of Pillow; ImportError with the pip command if it is not installed."""
    try:
        return importlib.import_module(f"PIL.{module}")
    except ImportError as error:
        raise ImportError(
            'images need Pillow, which is not installed: pip install "monoblock[vision]"'
        ) from error


def is_image(value: Any) -> bool:
    """Whether `value` is one image or one array, not a list or a string."""
    return is_pillow(value) or hasattr(value, "__array__")


def as_samples(images: Any) -> list[list[Any]]:
    """One list of images per sample: of an image, a batch [B, ...] in one array, a list, or a list of lists."""
    if images is None:
        return [[]]
    if isinstance(images, str | Path):
        return [[images]]
    if is_image(images):
        return [[image] for image in images] if getattr(images, "ndim", 3) == 4 else [[images]]
    if not isinstance(images, list | tuple):
        raise TypeError(f"expected an image or a list of images; got {type(images).__name__}")
    samples: list[list[Any]] = []
    for item in cast("Sequence[Any]", images):
        nested = isinstance(item, list | tuple) or getattr(item, "ndim", 3) == 4
        found: list[Any] = list(cast("Sequence[Any]", item)) if nested else [item]
        samples.append([image for image in found if image is not None])
    return samples


def is_pillow(value: Any) -> bool:
    """Whether `value` is a PIL image, without importing Pillow."""
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(value, module.Image)


def to_rgb(image: Any, layout: Layout | None = None) -> Pixels:
    """Any image as an array [height, width, 3], uint8 if its values are integers from 0 to 255.

    Args:
        image: a PIL image, the path of an image file, or an array or tensor [H, W], [H, W, C] or [C, H, W] with 1,
            3 or 4 channels. Palettes are resolved, grey is repeated, alpha is dropped.
        layout: "channels_first" or "channels_last" for arrays; None infers it from the shape.
    """
    if isinstance(image, str | Path):
        image = _open(str(image))
    if is_pillow(image):
        return _from_pillow(image)
    if hasattr(image, "detach"):  # a PyTorch tensor, perhaps on a device, with a gradient or in bfloat16
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if not hasattr(image, "__array__"):
        raise TypeError(
            f"an image is a PIL image, an array, a tensor or the path of a file; got {type(image).__name__}"
        )
    return _from_array(np.asarray(image), layout)


def _open(path: str) -> Any:
    if path.startswith(("http://", "https://", "data:")):
        raise ValueError(
            f"{path[:60]!r} is a URL, and nothing is downloaded here: open the image with Pillow first"
        )
    images = pillow()
    if not Path(path).is_file():
        raise ValueError(f"there is no image file {path!r}")
    try:
        with images.open(path) as opened:
            # Cameras store the orientation in EXIF metadata; PIL images that are passed in are used unchanged.
            return pillow("ImageOps").exif_transpose(opened)
    except images.UnidentifiedImageError as error:
        raise ValueError(f"{path!r} is not an image that Pillow can read") from error


def _from_pillow(image: Any) -> Pixels:
    if image.mode.startswith(_WIDE_MODES):
        raise ValueError(
            f"an image of Pillow's mode {image.mode!r} has no 8-bit values: scale it to 0..255 and convert it first"
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def _from_array(array: Pixels, layout: Layout | None) -> Pixels:
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim != 3:
        raise ValueError(f"an image has 2 or 3 axes; got an array of shape {array.shape}")
    elif (layout or _layout_of(array)) == "channels_first":
        array = np.moveaxis(array, 0, -1)
    height, width, channels = array.shape
    if channels not in _CHANNELS:
        raise ValueError(
            f"an image has 1, 3 or 4 channels; got {channels} (with input_data_format={layout!r})"
        )
    if not height or not width:
        raise ValueError(f"the image is empty: it is {height} high and {width} wide")
    array = np.repeat(array, 3, axis=-1) if channels == 1 else array[..., :3]
    return _as_values(array)


def _layout_of(array: Pixels) -> Layout:
    first, last = array.shape[0], array.shape[-1]
    if first not in _CHANNELS and last not in _CHANNELS:
        raise ValueError(
            f"an image has 1, 3 or 4 channels, first or last; got an array of shape {array.shape}"
        )
    # If both could be channels, three channels are more likely than an image three pixels wide or high.
    likely = [
        length == 3 if first in _CHANNELS and last in _CHANNELS else length in _CHANNELS
        for length in (first, last)
    ]
    found: Layout = "channels_last" if likely == [False, True] else "channels_first"
    if first in _CHANNELS and last in _CHANNELS:
        log.warning("an image of shape %s is read as %s: otherwise set input_data_format", array.shape, found)
    return found


def _as_values(array: Pixels) -> Pixels:
    """uint8 where it represents the values exactly, float32 otherwise."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"an image holds integers or floating-point numbers; got an array of {array.dtype}")
    if not np.isfinite(array).all():
        raise ValueError("the image has values that are not finite (NaN or infinite)")
    if array.dtype.kind in "iu":
        if array.min() < 0 or array.max() > 255:
            raise ValueError(
                f"an image of integers has values from 0 to 255; got {array.min()} to {array.max()}"
            )
        return array.astype(np.uint8)
    return array.astype(np.float32)


def fitted_size(height: int, width: int, limit: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image that fits into `limit`: unchanged if it does, else shrunk with its aspect ratio."""
    if height <= limit[0] and width <= limit[1]:
        return height, width
    factor = min(limit[0] / height, limit[1] / width)
    return max(1, int(height * factor)), max(1, int(width * factor))


def resize(image: Pixels, size: tuple[int, int], resample: int) -> Pixels:
    """The image resized to (height, width) by a filter of Pillow; floating-point values are not rounded."""
    images = pillow()
    if image.dtype == np.float32 and _is_whole(image):
        return resize(image.astype(np.uint8), size, resample).astype(np.float32)
    if image.dtype == np.uint8:
        return np.asarray(images.fromarray(image).resize(size[::-1], resample=resample))
    planes = [np.ascontiguousarray(image[..., channel]) for channel in range(image.shape[-1])]
    resized = [np.asarray(images.fromarray(p).resize(size[::-1], resample=resample)) for p in planes]
    return np.stack(resized, axis=-1)


def _is_whole(image: Pixels) -> bool:
    return bool(image.min() >= 0 and image.max() <= 255 and (image == np.rint(image)).all())


def pad(image: Pixels, size: tuple[int, int], mode: str, value: float) -> Pixels:
    """The image at the top left of one of `size`; the rest is `value` (mode "constant") or extends the image."""
    height, width = image.shape[:2]
    if height > size[0] or width > size[1]:
        raise ValueError(
            f"an image of {height}x{width} does not fit into size {size[0]}x{size[1]}: leave do_resize on, or use a "
            "larger size"
        )
    if (height, width) == size:
        return image
    widths = ((0, size[0] - height), (0, size[1] - width), (0, 0))
    if PAD_MODES[mode] != "constant":
        return np.pad(image, widths, mode=cast(Any, PAD_MODES[mode]))
    if image.dtype == np.uint8 and not (float(value).is_integer() and 0 <= value <= 255):
        image = image.astype(np.float32)  # `value` is not a uint8
    return np.pad(image, widths, constant_values=value)


def rescale(image: Pixels, factor: float) -> Pixels:
    """`image * factor` in float32; computed in float64, so that the factor is not rounded first."""
    return (image.astype(np.float64) * factor).astype(np.float32)


def normalize(image: Pixels, mean: float | tuple[float, ...], std: float | tuple[float, ...]) -> Pixels:
    """`(image - mean) / std` in float32; per channel for three values."""
    return (image.astype(np.float32) - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def patches(image: Pixels, patch: tuple[int, int]) -> Pixels:
    """[patches, patch height * patch width * channels]: row-major order, channels last inside a patch."""
    height, width, channels = image.shape
    rows, columns = height // patch[0], width // patch[1]
    cut = image.reshape(rows, patch[0], columns, patch[1], channels).swapaxes(1, 2)
    return np.ascontiguousarray(cut.reshape(rows * columns, patch[0] * patch[1] * channels))
