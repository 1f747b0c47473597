"""What a request gives: pieces of text as they come, and complete sequences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]


class QueueFull(Exception):
    """The engine has as many waiting requests as it accepts; try again later."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, and those of the likeliest tokens at its position, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """New text of sequence `index` of a request, with the tokens since the last one.

    `stop`: the stop string or the id of the token that ended the sequence, if one did.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    stop: str | int | None = None


@dataclass
class Completion:
    """A complete sequence. `tokens` are all generated ones, with an eos token or those of a stop string."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    finish: FinishReason | None = None
    stop: str | int | None = None

    def add(self, delta: Delta) -> None:
        """Append a delta of this sequence."""
        self.text += delta.text
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.finish, self.stop = delta.finish, delta.stop


@dataclass
class Usage:
    """Token counts of a request; `cached` of the prompt's tokens were in the prefix cache."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0


def best(found: list[Completion], count: int) -> list[Completion]:
    """The `count` sequences with the largest mean log-probability, renumbered; all if there are no more."""
    if len(found) == count:
        return found

    def mean(completion: Completion) -> float:
        values = [entry.logprob for entry in completion.logprobs]
        return sum(values) / max(1, len(values))

    kept = sorted(found, key=mean, reverse=True)[:count]
    for index, completion in enumerate(kept):
        completion.index = index
    return kept
