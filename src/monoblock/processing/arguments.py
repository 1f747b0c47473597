"""Sorts and checks the arguments of `FuyuProcessor.__call__`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from monoblock.processing import pixels
from monoblock.processing.options import SETTINGS, refuse
from monoblock.processing.patching import round_up

# Tokenizer arguments that are not supported with images, and their values without effect.
_TEXT_ONLY: dict[str, tuple[Any, ...]] = {
    "truncation": (None, False, "do_not_truncate"),
    "stride": (0,),
    "return_overflowing_tokens": (False,),
    "return_special_tokens_mask": (False,),
    "return_offsets_mapping": (False,),
    "return_token_type_ids": (False, None),
    "return_length": (False,),
}
_IMAGE_ARGUMENTS = (*SETTINGS, "input_data_format")
_GROUPS = (
    "text_kwargs",
    "images_kwargs",
    "common_kwargs",
)  # of newer processors: the same arguments, grouped


def split_arguments(arguments: dict[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The image options among a call's further keywords; text options are stored in `arguments`."""
    settings: dict[str, Any] = {}
    flat = {name: value for name, value in kwargs.items() if name not in _GROUPS}
    for group in (flat, *(kwargs.get(name) or {} for name in _GROUPS)):
        for name, value in cast("Mapping[str, Any]", group).items():
            if name in arguments:
                arguments[name] = value
            elif not (name not in _IMAGE_ARGUMENTS and refuse(name, value)):
                settings[name] = value
    if unknown := [name for name in settings if name not in _IMAGE_ARGUMENTS]:
        raise TypeError(
            f"FuyuProcessor has no argument {unknown[0]!r}; its image options are: {', '.join(_IMAGE_ARGUMENTS)}"
        )
    return settings


def refuse_text_only(arguments: Mapping[str, Any]) -> None:
    for name, harmless in _TEXT_ONLY.items():
        if arguments[name] not in harmless:
            raise ValueError(
                f"{name}={arguments[name]!r} applies to text alone, and is not supported with images"
            )


def is_image_input(value: Any) -> bool:
    """Whether a value is an image, or a list that begins with one; a path counts as text."""
    while isinstance(value, list | tuple):
        items = cast("Sequence[Any]", value)
        value = next((item for item in items if item is not None and item != []), None)
    return pixels.is_image(value)


def pairs(text: Any, images: Any) -> list[tuple[str, Any]]:
    """(text, image or None) per sample."""
    samples = pixels.as_samples(images)
    texts: list[Any] = (
        [""] * len(samples) if text is None else [text] if isinstance(text, str) else list(text)
    )
    if wrong := [one for one in texts if not isinstance(one, str)]:
        raise TypeError(
            f"with images, text is a string or a list of strings; got {type(wrong[0]).__name__} in it"
        )
    if len(texts) != len(samples):
        raise ValueError(
            f"there are {len(texts)} texts and {len(samples)} images: pass one image per text, None for a text without"
        )
    if crowded := [number for number, sample in enumerate(samples) if len(sample) > 1]:
        raise ValueError(
            f"sample {crowded[0]} has {len(samples[crowded[0]])} images: Fuyu takes one image per text"
        )
    return [(one, sample[0] if sample else None) for one, sample in zip(texts, samples, strict=True)]


def padded_length(longest: int, arguments: Mapping[str, Any]) -> int:
    """The length of a batch with images: that of its longest row, or more as padding requires."""
    padding = getattr(arguments["padding"], "value", arguments["padding"])
    maximum, multiple = arguments["max_length"], arguments["pad_to_multiple_of"] or 1
    if padding not in (False, True, "longest", "do_not_pad", "max_length"):
        raise ValueError(
            f"padding={padding!r}: expected True, False, 'longest', 'do_not_pad' or 'max_length'"
        )
    if (padding == "max_length") != (maximum is not None):
        raise ValueError(
            f"padding={padding!r} with max_length={maximum}: with images nothing is truncated, so max_length goes with "
            "padding='max_length' and only with it"
        )
    return round_up(max(longest, maximum or 0), multiple)
