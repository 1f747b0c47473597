"""Entities from token scores: words, groups of adjacent tokens with one tag, and overlaps between chunks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

STRATEGIES = ("none", "simple", "first", "average", "max")
BY_WORD = ("first", "average", "max")


@dataclass
class TokenGroup:
    """A token, or the tokens of a word: scores [labels], and the range of characters in the text."""

    scores: np.ndarray
    tokens: list[str]
    start: int
    end: int
    index: int
    continues: bool = False  # whether it continues the word of the group before

    @property
    def best(self) -> int:
        return int(self.scores.argmax())


def _first(groups: Sequence[TokenGroup]) -> np.ndarray:
    return groups[0].scores


def _most_confident(groups: Sequence[TokenGroup]) -> np.ndarray:
    return max(groups, key=lambda group: group.scores.max()).scores


def _average(groups: Sequence[TokenGroup]) -> np.ndarray:
    return np.nanmean(np.stack([group.scores for group in groups]), axis=0)


_SCORES = {"first": _first, "max": _most_confident, "average": _average}


def merge_words(groups: Sequence[TokenGroup], strategy: str) -> list[TokenGroup]:
    """The groups of words, with the scores that the strategy chooses from those of their tokens."""
    words: list[list[TokenGroup]] = []
    for group in groups:
        if group.continues and words:
            words[-1].append(group)
        else:
            words.append([group])
    return [
        TokenGroup(
            _SCORES[strategy](word),
            [t for p in word for t in p.tokens],
            word[0].start,
            word[-1].end,
            word[0].index,
        )
        for word in words
    ]


def tag_of(label: str) -> tuple[bool, str]:
    """Whether a label begins an entity, and the entity's tag: "B-PER" -> (True, "PER")."""
    return label.startswith("B-"), label[2:] if label.startswith(("B-", "I-")) else label


def merge_entities(
    groups: Sequence[TokenGroup], labels: Mapping[int, str], join: Callable[[list[str]], str], words: bool
) -> list[dict[str, Any]]:
    """Merges adjacent groups of one tag into an entity; a B- label begins a new one.

    `join`: tokens to text. `words`: the groups are words, whose tokens are joined before the words are.
    """
    found: list[list[TokenGroup]] = []
    last: str | None = None
    for group in groups:
        begins, tag = tag_of(labels[group.best])
        if found and tag == last and not begins:
            found[-1].append(group)
        else:
            found.append([group])
        last = tag
    return [
        {
            "entity_group": labels[members[0].best].split("-", 1)[-1],
            "score": float(np.nanmean([group.scores[group.best] for group in members])),
            "word": join(
                [join(p.tokens) for p in members] if words else [t for p in members for t in p.tokens]
            ),
            "start": members[0].start,
            "end": members[-1].end,
        }
        for members in found
    ]


def without_overlaps(entities: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of overlapping entities (chunks overlap) the longest; of equally long ones that with the highest score."""
    kept: list[dict[str, Any]] = []
    for entity in sorted(entities, key=lambda entity: entity["start"]):
        last = kept[-1] if kept else None
        if last is None or entity["start"] >= last["end"]:
            kept.append(entity)
        elif _rank(entity) > _rank(last):
            kept[-1] = entity
    return kept


def _rank(entity: dict[str, Any]) -> tuple[int, float]:
    return entity["end"] - entity["start"], entity["score"]
