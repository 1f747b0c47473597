"""Entities from the scores of tokens: words, groups of tokens with one tag, and groups that chunks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

STRATEGIES = ("none", "simple", "first", "average", "max")
BY_WORD = ("first", "average", "max")


@dataclass
class TokenGroup:
    """A token, or the tokens of a word: its scores [labels], and the characters of the text that it stands for."""

    scores: np.ndarray
    tokens: list[str]
    start: int
    end: int
    index: int
    continues: bool = False  # whether it goes on with the word before

    @property
    def best(self) -> int:
        return int(self.scores.argmax())


def _first(pieces: Sequence[TokenGroup]) -> np.ndarray:
    return pieces[0].scores


def _surest(pieces: Sequence[TokenGroup]) -> np.ndarray:
    return max(pieces, key=lambda piece: piece.scores.max()).scores


def _average(pieces: Sequence[TokenGroup]) -> np.ndarray:
    return np.nanmean(np.stack([piece.scores for piece in pieces]), axis=0)


_SCORES = {"first": _first, "max": _surest, "average": _average}


def by_word(pieces: Sequence[TokenGroup], strategy: str) -> list[TokenGroup]:
    """Words instead of tokens, each with the scores that the strategy gives it."""
    words: list[list[TokenGroup]] = []
    for piece in pieces:
        if piece.continues and words:
            words[-1].append(piece)
        else:
            words.append([piece])
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
    """Whether a label begins an entity, and the entity's name: "B-PER" -> (True, "PER")."""
    return label.startswith("B-"), label[2:] if label.startswith(("B-", "I-")) else label


def groups(
    pieces: Sequence[TokenGroup], labels: Mapping[int, str], join: Callable[[list[str]], str], words: bool
) -> list[dict[str, Any]]:
    """Neighbours of one tag as one entity; a B- label begins a new one.

    `join`: tokens to text. `words`: the pieces are words, each of which is joined for itself before all are.
    """
    found: list[list[TokenGroup]] = []
    last: str | None = None
    for piece in pieces:
        begins, tag = tag_of(labels[piece.best])
        if found and tag == last and not begins:
            found[-1].append(piece)
        else:
            found.append([piece])
        last = tag
    return [
        {
            "entity_group": labels[group[0].best].split("-", 1)[-1],
            "score": float(np.nanmean([piece.scores[piece.best] for piece in group])),
            "word": join([join(p.tokens) for p in group] if words else [t for p in group for t in p.tokens]),
            "start": group[0].start,
            "end": group[-1].end,
        }
        for group in found
    ]


def without_overlaps(entities: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of entities that overlap, because chunks do, the longer one, or of two as long the surer one."""
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
