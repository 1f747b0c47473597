"""Boxes and points: from prompts to the tokens that Fuyu knows, and from its tokens to text.

In a prompt they are `<box>y1, x1, y2, x2</box>` and `<point>x, y</point>`, in pixels of the original image. The model
sees four or two number tokens between an opening and a closing token: pixels of the resized image, halved.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Scale = tuple[float, float]  # resized / original: (height, width)

_AXES = {"y": 0, "x": 1}
_SHOWN = 40  # characters of a prompt that an error shows


@dataclass(frozen=True)
class Kind:
    """A box or a point: its name in prompts, which axis each number is on, and its tokens in the vocabulary."""

    name: str
    axes: str
    open_token: str
    close_token: str

    @property
    def form(self) -> str:
        """How to write one."""
        names = {"yxyx": "y1, x1, y2, x2", "xy": "x, y"}[self.axes]
        return f"<{self.name}>{names}</{self.name}>"


KINDS = (Kind("box", "yxyx", "<0x00>", "<0x01>"), Kind("point", "xy", "<0x02>", "<0x03>"))

# Every spelling of a tag -> (kind, whether it opens). The tokens' own names are spellings too.
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
class Place:
    """A box or a point in a prompt: its numbers in pixels of the original image, and the character it begins at."""

    kind: Kind
    values: tuple[float, ...]
    start: int

    def model_values(self, scale: Scale) -> tuple[int, ...]:
        """The numbers as the model has them: of the resized image, halved and rounded."""
        pairs = zip(self.values, self.kind.axes, strict=True)
        return tuple(round(value / 2 * scale[_AXES[axis]]) for value, axis in pairs)


def has_tag(prompt: str) -> bool:
    """Whether there is any tag of a box or a point in it, also a wrong one."""
    return _TAG.search(prompt) is not None


def split(prompt: str) -> list[str | Place]:
    """The texts, boxes and points of a prompt, in order; ValueError shows where one is malformed."""
    tags = list(_TAG.finditer(prompt))
    parts: list[str | Place] = []
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
        parts.append(prompt[end : opening.start()])
        inside = prompt[opening.end() : closing.start()]
        parts.append(Place(kind, _numbers(prompt, opening.start(), inside, kind), opening.start()))
        end = closing.end()
    return [part for part in (*parts, prompt[end:]) if part != ""]


def _numbers(prompt: str, start: int, inside: str, kind: Kind) -> tuple[float, ...]:
    pieces = inside.split(",")
    if len(pieces) != len(kind.axes):
        raise _error(prompt, start, f"has {len(pieces)} numbers, not {len(kind.axes)}", kind)
    for piece in pieces:
        if not _NUMBER.fullmatch(piece):
            raise _error(prompt, start, f"holds {piece.strip()!r}, which is not a number", kind)
        if float(piece) < 0:
            raise _error(prompt, start, f"holds {piece.strip()}, which is outside the image", kind)
    return tuple(map(float, pieces))


def _error(prompt: str, start: int, what: str, kind: Kind) -> ValueError:
    shown = prompt[start : start + _SHOWN] + ("..." if len(prompt) > start + _SHOWN else "")
    return ValueError(f"the prompt's {shown!r} at character {start} {what}: write {kind.form}")


@dataclass(frozen=True)
class CoordinateTokens:
    """The ids of the tags in one vocabulary, and what it takes to read and write around them."""

    ids: dict[int, tuple[Kind, bool]]
    token: Callable[[int], str]  # the token of an id
    encode: Callable[[str], list[int]]  # the ids of a text in the middle of a sequence

    def to_text(self, ids: Sequence[int], scale: Scale, row: int) -> list[int]:
        """Ids with every box and point of the model written out as text, in pixels of the original image.

        ValueError with the row and the token where one is malformed.
        """
        tags = [place for place, index in enumerate(ids) if index in self.ids]
        if len(tags) % 2 == 1:
            tags.append(-1)
        out: list[int] = []
        end = 0
        for start, close in zip(tags[::2], tags[1::2], strict=True):
            kind = self._check(ids, start, close, row)
            out += ids[end:start]
            values = [self._value(ids[place], row, place, kind) for place in range(start + 1, close)]
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
                row, start, f"a {kind.name} is opened and not closed: generate more tokens, or cut it off"
            )
        if self.ids[ids[close]] != (kind, False):
            raise _row_error(row, start, f"a {kind.name} is opened, but {self.token(ids[close])} comes next")
        if close - start - 1 != len(kind.axes):
            raise _row_error(
                row, start, f"a {kind.name} has {close - start - 1} numbers, not {len(kind.axes)}"
            )
        return kind

    def _value(self, index: int, row: int, place: int, kind: Kind) -> float:
        token = self.token(index).strip(" \u2581")  # a word that starts with a space begins with U+2581
        if _NUMBER.fullmatch(token) and math.isfinite(float(token)):
            return float(token)
        raise _row_error(row, place, f"a {kind.name} holds {token!r}, which is not a number")


def _row_error(row: int, place: int, what: str) -> ValueError:
    return ValueError(f"output {row}, token {place}: {what}")
