"""Boxes and points: from prompts to Fuyu's tokens, and from its tokens to text.

In a prompt they are `<box>y1, x1, y2, x2</box>` and `<point>x, y</point>`, in pixels of the original image. The model's
tokens are four or two numbers between an opening and a closing token, in pixels of the resized image, halved.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Scale = tuple[float, float]  # resized / original: (height, width)

_AXES = {"y": 0, "x": 1}
_SHOWN = 40  # characters of a prompt in an error message


@dataclass(frozen=True)
class Kind:
    """A box or a point: its name in prompts, the axis of each number, and its tokens in the vocabulary."""

    name: str
    axes: str
    open_token: str
    close_token: str

    @property
    def form(self) -> str:
        """The syntax in a prompt."""
        names = {"yxyx": "y1, x1, y2, x2", "xy": "x, y"}[self.axes]
        return f"<{self.name}>{names}</{self.name}>"


KINDS = (Kind("box", "yxyx", "<0x00>", "<0x01>"), Kind("point", "xy", "<0x02>", "<0x03>"))

# Every spelling of a tag -> (kind, whether it opens). The names of the tokens are spellings as well.
_TAGS = {
    spelling: (kind, opens)
    for kind in KINDS
    for opens, spellings in (
        (True, (f"<{kind.name}>", kind.open_token)),
        (False, (f"</{kind.name}>", kind.close_token)),
    )
    for spelling in spellings
}
_TAG = re.compile("|".join(map(re.escape, _TAGS)))
_NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)\s*")


@dataclass(frozen=True)
class CoordinateTag:
    """A box or a point in a prompt: its numbers in pixels of the original image, and its character offset."""

    kind: Kind
    values: tuple[float, ...]
    start: int

    def model_values(self, scale: Scale) -> tuple[int, ...]:
        """The model's numbers: in pixels of the resized image, halved and rounded."""
        pairs = zip(self.values, self.kind.axes, strict=True)
        return tuple(round(value / 2 * scale[_AXES[axis]]) for value, axis in pairs)


def has_tag(prompt: str) -> bool:
    """Whether the prompt contains any tag of a box or a point, even a misplaced one."""
    return _TAG.search(prompt) is not None


def split(prompt: str) -> list[str | CoordinateTag]:
    """The texts, boxes and points of a prompt, in order; ValueError shows a malformed one."""
    tags = list(_TAG.finditer(prompt))
    segments: list[str | CoordinateTag] = []
    end = 0
    for index in range(0, len(tags), 2):
        opening = tags[index]
        kind, opens = _TAGS[opening[0]]
        if not opens:
            raise _error(prompt, opening.start(), f"closes a {kind.name} that is not open", kind)
        if index + 1 == len(tags):
            raise _error(prompt, opening.start(), f"opens a {kind.name} that is not closed", kind)
        closing = tags[index + 1]
        if _TAGS[closing[0]] != (kind, False):
            raise _error(prompt, opening.start(), f"opens a {kind.name}, but {closing[0]} comes next", kind)
        segments.append(prompt[end : opening.start()])
        inside = prompt[opening.end() : closing.start()]
        segments.append(CoordinateTag(kind, _numbers(prompt, opening.start(), inside, kind), opening.start()))
        end = closing.end()
    return [segment for segment in (*segments, prompt[end:]) if segment != ""]


def _numbers(prompt: str, start: int, inside: str, kind: Kind) -> tuple[float, ...]:
    fields = inside.split(",")
    if len(fields) != len(kind.axes):
        raise _error(prompt, start, f"has {len(fields)} numbers, not {len(kind.axes)}", kind)
    for field in fields:
        if not _NUMBER.fullmatch(field):
            raise _error(prompt, start, f"holds {field.strip()!r}, which is not a number", kind)
        if float(field) < 0:
            raise _error(prompt, start, f"holds {field.strip()}, which is outside the image", kind)
    return tuple(map(float, fields))


def _error(prompt: str, start: int, what: str, kind: Kind) -> ValueError:
    shown = prompt[start : start + _SHOWN] + ("..." if len(prompt) > start + _SHOWN else "")
    return ValueError(f"the prompt's {shown!r} at character {start} {what}: write {kind.form}")


@dataclass(frozen=True)
class CoordinateTokens:
    """The ids of the tags in a vocabulary, with its id -> token and text -> ids functions."""

    ids: dict[int, tuple[Kind, bool]]
    token: Callable[[int], str]  # the token of an id
    encode: Callable[[str], list[int]]  # the ids of a text inside a sequence, without special tokens

    def to_text(self, ids: Sequence[int], scale: Scale, row: int) -> list[int]:
        """Ids with every box and point written as text, in pixels of the original image.

        ValueError with the row and the token for a malformed one.
        """
        tags = [position for position, token_id in enumerate(ids) if token_id in self.ids]
        if len(tags) % 2 == 1:
            tags.append(-1)
        out: list[int] = []
        end = 0
        for start, close in zip(tags[::2], tags[1::2], strict=True):
            kind = self._check(ids, start, close, row)
            out += ids[end:start]
            values = [self._value(ids[position], row, position, kind) for position in range(start + 1, close)]
            pixels = [round(2 * v / scale[_AXES[axis]]) for v, axis in zip(values, kind.axes, strict=True)]
            out += self.encode(f"<{kind.name}>{', '.join(map(str, pixels))}</{kind.name}>")
            end = close + 1
        return [*out, *ids[end:]]

    def _check(self, ids: Sequence[int], start: int, close: int, row: int) -> Kind:
        kind, opens = self.ids[ids[start]]
        if not opens:
            raise _row_error(row, start, f"a {kind.name} is closed that is not open")
        if close < 0:
            raise _row_error(
                row, start, f"a {kind.name} is opened and not closed: generate more tokens, or remove it"
            )
        if self.ids[ids[close]] != (kind, False):
            raise _row_error(row, start, f"a {kind.name} is opened, but {self.token(ids[close])} comes next")
        if close - start - 1 != len(kind.axes):
            raise _row_error(
                row, start, f"a {kind.name} has {close - start - 1} numbers, not {len(kind.axes)}"
            )
        return kind

    def _value(self, token_id: int, row: int, position: int, kind: Kind) -> float:
        token = self.token(token_id).strip(" \u2581")  # U+2581 marks a word after a space
        if _NUMBER.fullmatch(token) and math.isfinite(float(token)):
            return float(token)
        raise _row_error(row, position, f"a {kind.name} holds {token!r}, which is not a number")


def _row_error(row: int, position: int, what: str) -> ValueError:
    return ValueError(f"output {row}, token {position}: {what}")
