"""Drafts without a model: the continuation of an earlier occurrence of the last tokens.

Prompt lookup (Saxena 2023) takes the latest occurrence of an n-gram. Suffix decoding (arXiv 2411.04975) takes the
longest suffix that occurred in the sequence, or in an index of earlier texts, and the tokens that followed it most
often.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from monoblock.field_types import brief
from monoblock.generation.draft_rule import Acceptance, Draft
from monoblock.generation.suffix_automaton import IndexMatches, SuffixAutomaton, SuffixIndex

METHODS = ("suffix", "lookup")
DEFAULT_MATCH = 2  # tokens, transformers' default of max_matching_ngram_size
LONGEST_MATCH = 3  # tokens that the method "lookup" compares
MOST_TOKENS = 1 << 18  # of a sequence that are searched, the last ones
GRACE = 4  # steps without an accepted draft after which proposals may become rarer
LEAST_SHARE = 0.1  # a draft ends where all its tokens together are less probable


def check_method(method: Any) -> str | None:
    """The method of drafting that an option `speculation` names; None: none. ValueError for another value."""
    if method is None or method == "off":
        return None
    if not isinstance(method, str) or method not in METHODS:
        names = ", ".join(repr(name) for name in METHODS)
        raise ValueError(f"speculation={brief(method)}: expected {names} or 'off'")
    return method


class DraftSource(Protocol):
    """A source of draft tokens."""

    def propose(self, ids: list[int], room: int) -> Draft:
        """At most `room` tokens that may follow `ids`, which begin with those of the call before."""
        ...


class PromptLookup:
    """Prompt lookup: drafts the continuation of the latest earlier occurrence of the last tokens."""

    def __init__(self, count: int, longest: int):
        """`count`: tokens of a draft at most; `longest`: tokens that are compared at most."""
        self.count = count
        # For each length: n-gram -> the position after its latest occurrence.
        self.ends: list[dict[tuple[int, ...], int]] = [{} for _ in range(longest)]
        self.read = 1

    def propose(self, ids: list[int], room: int) -> Draft:
        """The tokens after the longest match; past the end of the sequence they repeat periodically."""
        for end in range(self.read, len(ids)):
            for size, ends in enumerate(self.ends[:end], start=1):
                ends[tuple(ids[end - size : end])] = end
        self.read = max(self.read, len(ids))
        count = min(self.count, room)
        for size in range(min(len(self.ends), len(ids) - 1), 0, -1):
            start = self.ends[size - 1].get(tuple(ids[-size:]))
            if start is not None:
                period = len(ids) - start
                tokens = [ids[start + index % period] for index in range(count)]
                return Draft(tokens, matched=size, shares=[1.0] * count)
        return Draft()


class SuffixDrafts:
    """Suffix decoding: drafts from the sequence itself, and from an index of earlier texts if there is one."""

    def __init__(self, count: int, acceptance: Acceptance, index: SuffixIndex | None = None) -> None:
        """`count`: tokens of a draft at most; `acceptance`: estimates which of several drafts is accepted furthest."""
        self.count, self.acceptance = count, acceptance
        self.own = SuffixAutomaton()
        self.read = 0  # tokens of the sequence in the automaton, or before its first
        self.earlier = None if index is None else IndexMatches(index)

    def feed(self, ids: Sequence[int], most: int = MOST_TOKENS) -> bool:
        """Add at most `most` new tokens of the sequence to its automaton; whether that was all."""
        start = max(self.read, len(ids) - MOST_TOKENS)
        if self.own.tokens + min(most, len(ids) - start) > MOST_TOKENS:
            self.own = SuffixAutomaton()  # begins again with the last half
            start = min(start, max(0, len(ids) - MOST_TOKENS // 2))
        end = min(len(ids), start + most)
        append = self.own.append
        for token in ids[start:end]:
            append(token)
        self.read = end
        return end == len(ids)

    def propose(self, ids: list[int], room: int) -> Draft:
        """The most frequent tokens after the match whose draft is expected to be accepted furthest."""
        self.feed(ids)
        count = min(self.count, room)
        state, matched = self.own.repeated()
        best = self._draft(self.own, state, matched, count)
        if self.earlier is not None:
            most = self.acceptance.expected(best)
            for match in self.earlier.of(ids):
                if match.length == 0:
                    continue
                draft = self._draft(match.automaton, match.current(), match.length, count)
                if (expected := self.acceptance.expected(draft)) > most:
                    best, most = draft, expected
        return best

    @staticmethod
    def _draft(automaton: SuffixAutomaton, state: int, matched: int, count: int) -> Draft:
        if not matched:
            return Draft()
        tokens, shares = automaton.continuation(state, count, LEAST_SHARE)
        return Draft(tokens, matched=matched, shares=shares)


class Speculator:
    """The drafts of one sequence, and how many of their tokens were accepted."""

    def __init__(self, source: DraftSource, acceptance: Acceptance) -> None:
        self.source, self.acceptance = source, acceptance
        self._passed = 0  # steps since a draft was accepted, or proposed where none is

    def propose(self, ids: list[int], room: int, stride: int = 1) -> Draft:
        """At most `room` tokens that may follow `ids`; while none is accepted, only at every `stride`th call."""
        self.acceptance.waited()
        self._passed += 1
        if room < 1 or (self._passed > GRACE and self._passed % stride):
            return Draft()
        return self.source.propose(ids, room)

    def learn(self, draft: Draft, verified: int, accepted: int) -> None:
        """Of a draft, so many tokens were verified and so many accepted."""
        if accepted:
            self._passed = 0
        self.acceptance.learn(draft, verified, accepted)


def speculator(
    method: str, count: int, *, parent: Acceptance | None = None, index: SuffixIndex | None = None
) -> Speculator:
    """The drafts of one sequence by a method of `METHODS`, of at most `count` tokens. `parent`: the acceptance of other
    sequences; `index`: of earlier texts, for "suffix"."""
    acceptance = Acceptance(parent)
    if method == "suffix":
        return Speculator(SuffixDrafts(count, acceptance, index), acceptance)
    return Speculator(PromptLookup(count, LONGEST_MATCH), acceptance)
