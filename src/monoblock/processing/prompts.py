"""Prompts to ids, with Fuyu's special tokens: the text between an image's placeholders and the answer."""

from __future__ import annotations

from typing import Any, cast

from monoblock.processing.coordinates import KINDS, CoordinateTag, CoordinateTokens, Scale, has_tag, split

IMAGE = "|SPEAKER|"
NEWLINE = "|NEWLINE|"
BEGIN = "<s>"
ANSWER = "<0x04>"  # precedes the answer

# Characters that are put before a text, so that it is encoded as in the middle of a sequence.
_ANCHORS = ("\n", "a", ".")


class Prompts:
    """Encodes prompts with a tokenizer of Fuyu's vocabulary; ValueError if it lacks the image tokens."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.image_id = self.id(IMAGE)
        self.newline_id = self.id(NEWLINE)

    def find(self, token: str) -> int | None:
        """The id of exactly this token, or None."""
        index = self.tokenizer.convert_tokens_to_ids(token)
        known = index is not None and self.tokenizer.convert_ids_to_tokens(index) == token
        return cast(int, index) if known else None

    def id(self, token: str) -> int:
        """The id of exactly this token; ValueError if the vocabulary lacks it."""
        if (index := self.find(token)) is None:
            raise ValueError(
                f"the tokenizer has no token {token!r}: FuyuProcessor needs Fuyu's own tokenizer"
            )
        return index

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens around it."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, text: str, scale: Scale | None) -> list[int]:
        """The ids of a prompt; coordinates are multiplied by `scale`, the resized / original size of the image.

        Each text between boxes is encoded separately, as in Adept's implementation. ValueError for malformed boxes,
        boxes without an image (`scale` None), and texts that contain an image's placeholder.
        """
        if scale is None:
            self.without_image(text)
        ids: list[int] = []
        for segment in split(text):
            ids += (
                self.encode(segment)
                if isinstance(segment, str)
                else self._tag_ids(segment, scale or (1.0, 1.0))
            )
        if self.image_id in ids:
            raise ValueError(f"the prompt {text[:60]!r} holds {IMAGE}, which stands for a patch of an image")
        return ids

    def without_image(self, text: str) -> None:
        """ValueError for a text with a box or a point but without an image."""
        if has_tag(text):
            raise ValueError(
                f"the prompt {text[:60]!r} has a box or a point, but no image: pass the image, or encode the text with "
                "the tokenizer alone"
            )

    def _tag_ids(self, tag: CoordinateTag, scale: Scale) -> list[int]:
        ids = [self.id(tag.kind.open_token)]
        for value in tag.model_values(scale):
            if (index := self.find(str(value))) is None:
                raise ValueError(
                    f"the {tag.kind.name} at character {tag.start} of the prompt needs the coordinate {value} (of "
                    "the resized image, halved), which is not in the vocabulary: is it outside the image?"
                )
            ids.append(index)
        return [*ids, self.id(tag.kind.close_token)]

    def inner(self, text: str) -> list[int]:
        """The ids of a text inside a sequence: without the space that some tokenizers insert before a text."""
        for anchor in _ANCHORS:
            encoded = self.tokenizer(anchor + text, add_special_tokens=False, return_offsets_mapping=True)
            spans: list[tuple[int, int]] = [tuple(span) for span in encoded["offset_mapping"]]
            first = sum(end <= len(anchor) for _, end in spans)
            if first < len(spans) and spans[first][0] == len(anchor):
                return list(encoded["input_ids"][first:])
        return self.encode(text)

    def coordinates(self) -> CoordinateTokens:
        """The conversion of the model's boxes and points to text."""
        ids = {self.id(kind.open_token): (kind, True) for kind in KINDS}
        ids |= {self.id(kind.close_token): (kind, False) for kind in KINDS}
        return CoordinateTokens(
            ids, lambda index: str(self.tokenizer.convert_ids_to_tokens(index)), self.inner
        )
