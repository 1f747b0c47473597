"""Normalises the arguments of a call: texts to a batch, padding and truncation options to an `EncodingPlan`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from monoblock.texts import check_characters

PADDING = ("longest", "max_length", "do_not_pad")
TRUNCATION = ("longest_first", "only_first", "only_second", "do_not_truncate")
SIDES = ("right", "left")
UNLIMITED = 10**20  # a larger model_max_length stands for an unknown one


@dataclass(frozen=True, kw_only=True)
class EncodingPlan:
    """Resolved padding and truncation: a strategy each, with the lengths that they need."""

    padding: str
    truncation: str
    max_length: int | None
    multiple: int | None
    side: str

    @property
    def pads(self) -> bool:
        return self.padding != "do_not_pad"

    @property
    def truncates(self) -> bool:
        return self.truncation != "do_not_truncate"


def one_of(name: str, value: Any, known: Sequence[str]) -> str:
    """`value` if it is one of `known`; enums of other libraries are compared by value."""
    value = getattr(value, "value", value)
    if value in known:
        return str(value)
    raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, known))}")


def _named(value: Any, if_true: str, if_false: str) -> Any:
    return if_true if value is True else if_false if value is False or value is None else value


def _count(name: str, value: Any, least: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise ValueError(f"{name}={value!r}: expected an integer of at least {least}")
    return int(value)


def encoding_plan(
    padding: Any,
    truncation: Any,
    max_length: Any,
    *,
    multiple: Any,
    side: str,
    model_max_length: int,
    verbose: bool = True,
) -> EncodingPlan:
    """Resolve padding and truncation by transformers' rules.

    `max_length` alone enables truncation; its default is the model's; if that is unknown too, neither padding to
    `max_length` nor truncation takes place.
    """
    max_length, multiple = _count("max_length", max_length, 0), _count("pad_to_multiple_of", multiple, 1)
    if max_length is not None and padding is False and truncation is None:
        truncation = "longest_first"
    cut = one_of("truncation", _named(truncation, "longest_first", "do_not_truncate"), TRUNCATION)
    if padding is True and max_length is not None and cut == "do_not_truncate" and verbose:
        warnings.warn(
            "max_length has no effect with padding=True and no truncation: pass padding='max_length' to pad to it, "
            "or truncation=True to truncate to it",
            stacklevel=5,
        )
    fill = one_of("padding", _named(padding, "longest", "do_not_pad"), PADDING)
    if max_length is None and model_max_length > UNLIMITED:
        fill = "do_not_pad" if fill == "max_length" else fill
        cut = "do_not_truncate"
    elif max_length is None and (fill == "max_length" or cut != "do_not_truncate"):
        max_length = int(model_max_length)
    if (
        multiple
        and fill != "do_not_pad"
        and cut != "do_not_truncate"
        and max_length
        and max_length % multiple
    ):
        raise ValueError(
            f"max_length={max_length} is not a multiple of pad_to_multiple_of={multiple}: truncated texts could not be "
            "padded to a multiple"
        )
    return EncodingPlan(
        padding=fill,
        truncation=cut,
        max_length=max_length,
        multiple=multiple,
        side=one_of("padding_side", side, SIDES),
    )


def check_stride(stride: Any, plan: EncodingPlan, special: int) -> int:
    """The stride, an integer less than the number of text tokens that fit in one row."""
    stride = _count("stride", stride, 0) or 0
    if plan.truncates and plan.max_length is not None and stride and stride >= plan.max_length - special:
        raise ValueError(
            f"stride={stride} must be less than the {plan.max_length - special} tokens of text in a row "
            f"(max_length={plan.max_length} less {special} special tokens)"
        )
    return stride


_EXPECTED = (
    "expected a string, a list of strings, or pairs; for texts that are already split into words, lists of words with "
    "is_split_into_words=True"
)


def as_batch(text: Any, pair: Any, words: bool, name: str = "text") -> tuple[list[Any], bool]:
    """The texts, or pairs of texts, as a list; and whether a batch was passed (else a single text)."""
    sequence = isinstance(text, list | tuple)
    if not isinstance(text, str) and not sequence:
        raise ValueError(f"{name} is {_kind(text)}; {_EXPECTED}")
    items = cast(Sequence[Any], text)
    if not (sequence and (not words or (len(items) > 0 and isinstance(items[0], list | tuple)))):
        _check_one(items, words, name)
        if not pair:  # "" as well: an empty second text counts as none
            return [items], False
        _check_one(pair, words, f"{name}_pair")
        return [(items, pair)], False
    if pair is None:
        for index, item in enumerate(items):
            _check_item(item, words, f"{name}[{index}]")
        return list(items), True
    if not isinstance(pair, list | tuple):
        raise TypeError(
            f"{name} is a list of {len(items)}, so {name}_pair must be a list of as many; got {_kind(pair)}"
        )
    pairs = cast(Sequence[Any], pair)
    if len(pairs) != len(items):
        raise ValueError(
            f"{name} has {len(items)} items and {name}_pair {len(pairs)}: they must have the same length"
        )
    for index, (first, second) in enumerate(zip(items, pairs, strict=True)):
        _check_one(first, words, f"{name}[{index}]")
        _check_one(second, words, f"{name}_pair[{index}]")
    return list(zip(items, pairs, strict=True)), True


def _check_one(text: Any, words: bool, name: str) -> None:
    """Check one text: a string, or with `words` a list of strings."""
    if words:
        if isinstance(text, list | tuple) and all(
            isinstance(word, str) for word in cast(Sequence[Any], text)
        ):
            for word in cast(Sequence[str], text):
                check_characters(word, name)
            return
        raise ValueError(
            f"{name} is {_kind(text)}; with is_split_into_words=True a text is a list of words (strings)"
        )
    if not isinstance(text, str):
        raise ValueError(f"{name} is {_kind(text)}; {_EXPECTED}")
    check_characters(text, name)


def _check_item(item: Any, words: bool, name: str) -> None:
    """Check one item of a batch: a text, or a pair of texts."""
    if isinstance(item, list | tuple):
        texts = cast(Sequence[Any], item)
        if (words and texts and isinstance(texts[0], list | tuple)) or not words:
            if len(texts) != 2:
                raise ValueError(f"{name} is {_kind(texts)} of {len(texts)}; {_EXPECTED}")
            for index, text in enumerate(texts):
                _check_one(text, words, f"{name}[{index}]")
            return
    _check_one(item, words, name)


def _kind(value: Any) -> str:
    if isinstance(value, list | tuple):
        items = cast(Sequence[Any], value)
        inner = next((type(item).__name__ for item in items if not isinstance(item, str)), "str")
        return (
            f"a {type(items).__name__} with {inner} inside" if items else f"an empty {type(items).__name__}"
        )
    return f"{type(value).__name__} ({value!r})" if isinstance(value, int | float) else type(value).__name__
