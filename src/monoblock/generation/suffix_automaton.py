"""Suffix automata over token ids: the longest suffix that occurred before, and which tokens followed it how often.

A suffix automaton (Blumer et al. 1985) has one state for each set of end positions that substrings share; the states of
the suffixes of the text are the chain of suffix links from its last state. A token is appended in amortised O(1); the
counts of at most `WALK` suffixes, the longest first, are updated, so those of shorter ones may be too low.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Sequence

WALK = 32  # suffixes whose counts are updated for each token; text rarely has more states in a chain
NONE = -2  # no token follows
SEPARATOR = -1  # between texts; never matched, never proposed
CONTEXT = 32  # tokens with which a match in another text begins
SEGMENTS = 4  # of an index; the oldest is dropped as a whole
_SHIFT = 32
_COUNT = (1 << _SHIFT) - 1


class SuffixAutomaton:
    """The automaton of one growing text. State 0 is the empty string.

    The most frequent token after a state (the latest of equal ones) is in `first`, its target state in `target` and its
    count in `count`; `total` counts all tokens. Most states have no other token; `others` has those of the rest.
    """

    def __init__(self) -> None:
        self.length, self.link = array("i", [0]), array("i", [-1])
        self.first, self.target = array("i", [NONE]), array("i", [0])
        self.count, self.total = array("i", [0]), array("i", [0])
        self.others: dict[int, dict[int, int]] = {}  # state -> token -> target << 32 | count
        self.last = 0
        self.tokens = 0

    def append(self, token: int) -> None:
        """Append a token to the text."""
        length, link, first, target = self.length, self.link, self.first, self.target
        count, total, others = self.count, self.total, self.others
        state, new, after = self.last, len(length), -1
        length.append(length[state] + 1)
        self._room(0)
        # Suffixes that this token has not followed before.
        while state >= 0:
            if first[state] == token:
                after = target[state]
                break
            more = others.get(state)
            if more is not None and token in more:
                after = more[token] >> _SHIFT
                break
            total[state] += 1
            if count[state] <= 1:
                if first[state] != NONE:
                    others.setdefault(state, {})[first[state]] = target[state] << _SHIFT | count[state]
                first[state], target[state], count[state] = token, new, 1
            elif more is None:
                others[state] = {token: new << _SHIFT | 1}
            else:
                more[token] = new << _SHIFT | 1
            state = link[state]
        if state >= 0:
            if length[state] + 1 != length[after]:
                after = self._split(state, token, after)
            link[new] = after
            self._counted(state, token)
        self.last = new
        self.tokens += 1

    def _room(self, link: int) -> None:
        self.link.append(link)
        self.first.append(NONE)
        self.target.append(0)
        self.count.append(0)
        self.total.append(0)

    def _split(self, state: int, token: int, after: int) -> int:
        """A new state for the strings of `after` that are not longer than those of `state` and the token."""
        first, target, others, link = self.first, self.target, self.others, self.link
        new = len(self.length)
        self.length.append(self.length[state] + 1)
        self._room(link[after])
        first[new], target[new] = first[after], target[after]
        self.count[new], self.total[new] = self.count[after], self.total[after]
        if after in others:
            others[new] = dict(others[after])
        link[after] = new
        while state >= 0:
            if first[state] == token:
                if target[state] != after:
                    break
                target[state] = new
            else:
                packed = others[state][token]
                if packed >> _SHIFT != after:
                    break
                others[state][token] = new << _SHIFT | packed & _COUNT
            state = link[state]
        return new

    def _counted(self, state: int, token: int) -> None:
        """The token followed `state` and its suffixes, which it has followed before, once more."""
        first, target, count, total, others = self.first, self.target, self.count, self.total, self.others
        for _ in range(WALK):
            if state < 0:
                return
            total[state] += 1
            if first[state] == token:
                count[state] += 1
            else:
                more = others[state]
                packed = more[token] + 1
                if packed & _COUNT >= count[state]:
                    del more[token]
                    more[first[state]] = target[state] << _SHIFT | count[state]
                    first[state], target[state], count[state] = token, packed >> _SHIFT, packed & _COUNT
                else:
                    more[token] = packed
            state = self.link[state]

    def step(self, state: int, token: int) -> int:
        """The state after one more token, -1 if the text has no such string."""
        if self.first[state] == token:
            return self.target[state]
        more = self.others.get(state)
        packed = None if more is None else more.get(token)
        return -1 if packed is None else packed >> _SHIFT

    def repeated(self) -> tuple[int, int]:
        """The state and the length of the longest suffix of the text that occurs in it earlier, too."""
        state = max(0, self.link[self.last])
        return state, self.length[state]

    def continuation(self, state: int, most: int, least: float) -> tuple[list[int], list[float]]:
        """The tokens that followed `state` most often, one after the other, and the share that each has of all tokens
        that followed the same string; at most `most`, until the product of the shares is below `least`. At the end of
        the text it goes on after the longest suffix that occurs earlier, so periodic text continues."""
        tokens: list[int] = []
        shares: list[float] = []
        product = 1.0
        while len(tokens) < most:
            while (token := self.first[state]) == NONE and state:
                state = self.link[state]
            if token < 0:
                break
            share = self.count[state] / self.total[state]
            product *= share
            if product < least:
                break
            tokens.append(token)
            shares.append(share)
            state = self.target[state]
        return tokens, shares


class SuffixMatch:
    """The longest suffix of a text that occurs in another one's automaton, token by token."""

    def __init__(self, automaton: SuffixAutomaton) -> None:
        self.automaton = automaton
        self.state = self.length = 0

    def append(self, token: int) -> None:
        """The text has one more token."""
        automaton = self.automaton
        state = self.current()
        length = self.length
        while (after := automaton.step(state, token)) < 0:
            state = automaton.link[state]
            if state < 0:
                self.state = self.length = 0
                return
            length = automaton.length[state]
        self.state, self.length = after, length + 1

    def current(self) -> int:
        """The state of the match, which may have been split since."""
        automaton = self.automaton
        while self.state and self.length <= automaton.length[automaton.link[self.state]]:
            self.state = automaton.link[self.state]
        return self.state


class SuffixIndex:
    """Automata of finished texts, of at most `capacity` tokens together; the oldest texts are dropped first."""

    def __init__(self, capacity: int) -> None:
        if capacity < SEGMENTS:
            raise ValueError(f"capacity={capacity}: expected at least {SEGMENTS} tokens")
        self.most = capacity // SEGMENTS
        self.segments: deque[SuffixAutomaton] = deque()

    @property
    def tokens(self) -> int:
        """Tokens in the index, separators included."""
        return sum(segment.tokens for segment in self.segments)

    def add(self, tokens: Sequence[int]) -> None:
        """Add a text, or as much of its end as fits a segment."""
        tokens = tokens[-(self.most - 1) :] if self.most > 1 else ()
        if not tokens:
            return
        if not self.segments or self.segments[-1].tokens + len(tokens) + 1 > self.most:
            self.segments.append(SuffixAutomaton())
            if len(self.segments) > SEGMENTS:
                self.segments.popleft()
        segment = self.segments[-1]
        for token in tokens:
            segment.append(token)
        segment.append(SEPARATOR)


class IndexMatches:
    """The matches of one text in all segments of an index."""

    def __init__(self, index: SuffixIndex) -> None:
        self.index = index
        self._matches: list[SuffixMatch] = []
        self._read = 0

    def of(self, text: Sequence[int]) -> Iterable[SuffixMatch]:
        """The matches of a text, which begins with that of the call before."""
        segments = self.index.segments
        known = {id(match.automaton): match for match in self._matches}
        self._matches = [known.get(id(segment)) or SuffixMatch(segment) for segment in segments]
        for match in self._matches:
            start = self._read if id(match.automaton) in known else 0
            for token in text[max(start, len(text) - CONTEXT) :]:
                match.append(token)
        self._read = len(text)
        return self._matches
