"""The options of Fuyu's image processor: their validation, and options of other processors that it refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from monoblock.field_types import brief
from monoblock.processing.pixels import PAD_MODES

# Options of transformers' image processors that Fuyu does not support: their value without effect, and the reason.
_REFUSED: dict[str, tuple[Any, str]] = {
    "do_center_crop": (False, "Fuyu pads its images, it does not crop them"),
    "crop_size": (None, "Fuyu pads its images, it does not crop them"),
    "pad_size": (None, "images are padded to size"),
    "size_divisor": (None, "images are padded to whole patches of patch_size"),
    "default_to_square": (True, "give size as a dictionary"),
    "image_seq_length": (None, "the number of patches follows from the image"),
    "device": (None, "images are processed on the CPU: call .to(device) on the result"),
}
MOST_PIXELS = 2**24  # maximum of the padded size and of a patch; Fuyu's are 1080 x 1920 and 30 x 30
_NO_EFFECT = ("disable_grouping",)  # an implementation detail of transformers' fast processors
_LAYOUTS = ("channels_first", "channels_last")


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """The options of one call; ValueError or TypeError for an invalid one."""

    do_resize: bool
    size: tuple[int, int]
    resample: int
    do_pad: bool
    padding_value: float
    padding_mode: str
    do_normalize: bool
    image_mean: float | tuple[float, ...]
    image_std: float | tuple[float, ...]
    do_rescale: bool
    rescale_factor: float
    patch_size: tuple[int, int]

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> ImageOptions:
        """The options of a dictionary with transformers' names."""
        return cls(**{name: check(name, values[name]) for name, check in _CHECKS.items()})


def height_width(name: str, value: Any) -> tuple[int, int]:
    """(height, width) of `{"height": 1080, "width": 1920}`, of a pair, or of one number for a square."""
    pair: Any = value
    if isinstance(value, Mapping):
        mapping = dict(cast("Mapping[str, Any]", value))
        extra = [key for key, item in mapping.items() if key not in ("height", "width") and item is not None]
        pair = (mapping.get("height"), mapping.get("width")) if not extra else None
    elif isinstance(value, int):
        pair = (value, value)
    if isinstance(pair, list | tuple):
        numbers = list(cast("Sequence[Any]", pair))
        if (
            len(numbers) == 2
            and all(_is_length(n) for n in numbers)
            and numbers[0] * numbers[1] <= MOST_PIXELS
        ):
            return int(numbers[0]), int(numbers[1])
    raise ValueError(
        f'{name} must look like {{"height": 30, "width": 30}}, with at most {MOST_PIXELS:,} pixels; got '
        + brief(value)
    )


def _is_length(value: Any) -> bool:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole and not isinstance(value, bool) and value > 0


def layout(name: str, value: Any) -> Any:
    """ "channels_first", "channels_last" or None, also from transformers' enum."""
    text = getattr(value, "value", value)
    if text is not None and text not in _LAYOUTS:
        raise ValueError(f"{name}={brief(text)}: expected one of {', '.join(map(repr, _LAYOUTS))}")
    return text


def refuse(name: str, value: Any) -> bool:
    """Whether `name` is an option of transformers with a value without effect; TypeError for one with an effect."""
    if name in _NO_EFFECT or (name in _REFUSED and value in (None, _REFUSED[name][0])):
        return True
    if name in _REFUSED:
        raise TypeError(f"FuyuImageProcessor does not support {name}={brief(value)}: {_REFUSED[name][1]}")
    if name == "do_convert_rgb":
        if value in (None, True):
            return True
        raise TypeError(
            "FuyuImageProcessor does not support do_convert_rgb=False: Fuyu takes RGB images only"
        )
    return False


def _number(name: str, value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    raise TypeError(f"{name} must be a number; got {brief(value)}")


def _per_channel(name: str, value: Any) -> float | tuple[float, ...]:
    if not isinstance(value, list | tuple):
        value = _number(name, value)
        zero = value == 0
    else:
        value = tuple(_number(name, item) for item in cast("Sequence[Any]", value))
        if len(value) != 3:
            raise ValueError(f"{name} must be one number, or three for red, green and blue; got {len(value)}")
        zero = 0 in value
    if name == "image_std" and zero:
        raise ValueError("image_std must not be 0: pixels are divided by it")
    return value


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise TypeError(f"{name} must be True or False; got {brief(value)}")


def _pad_mode(name: str, value: Any) -> str:
    mode = str(getattr(value, "value", value))
    if mode in PAD_MODES:
        return mode
    raise ValueError(f"{name}={brief(mode)}: expected one of {', '.join(map(repr, PAD_MODES))}")


def _resample(name: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 5:
        return int(value)
    raise ValueError(
        f"{name} must be one of Pillow's filters, PIL.Image.Resampling or 0 to 5; got {brief(value)}"
    )


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "do_resize": _flag,
    "size": height_width,
    "resample": _resample,
    "do_pad": _flag,
    "padding_value": _number,
    "padding_mode": _pad_mode,
    "do_normalize": _flag,
    "image_mean": _per_channel,
    "image_std": _per_channel,
    "do_rescale": _flag,
    "rescale_factor": _number,
    "patch_size": height_width,
}
SETTINGS = tuple(_CHECKS)
