"""How many draft tokens a step verifies: as many as are expected to save time, none where they do not.

The expected number of tokens of a step, divided by its time, is maximised over the number of draft tokens of all
sequences together ("goodput" of arXiv 2406.14066). Times are those of the run's own steps. A balance bounds what drafts
that are rejected may cost, whatever the estimates say.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from monoblock.generation.arrays import Array

clock: Callable[[], float] = time.perf_counter

# Tokens of a step whose times are recorded; other numbers count as the nearest of these.
SIZES = (
    *range(1, 17),
    20,
    24,
    28,
    32,
    40,
    48,
    56,
    64,
    80,
    96,
    112,
    128,
    160,
    192,
    224,
    256,
    320,
    384,
    448,
    512,
)
RECENT = 8  # times of a size of which the least is used
SURE_TIMES = (
    3  # of a size with drafts, until a time is believed that is more than `PLAUSIBLE` times the expected one
)
PLAUSIBLE = 1.5
FORGETTING = 256  # steps after which a size that did not occur is measured again
MOST_SURPRISE = 2.0  # the first time of a size counts at most so many times the expected one
PRIOR_SLOPE = 0.06  # time of one more token, of that of a step of one, before it is measured
# The balance, in steps without drafts: at the start, what each step adds to it, and its limits. With a rate of
# 0.015 and a start of 0.25, rejected drafts cost less than 3% of the time of 20 tokens or more.
START, RATE, LOWEST, HIGHEST = 0.25, 0.015, -0.5, 4.0
FIRST_DRAFT, GROWTH = 2, 3  # tokens of all drafts in a step at most, and how many times what was measured
LEAST_CHANCE = 0.02
MARGIN = 1.02  # expected speedup below which there is no draft
# Steps until a draft of one token is tried where more are not worthwhile; doubled each time that it is rejected.
FIRST_WAIT, LONGEST_WAIT = 8, 256
# Proposals take at most this part of the time where drafts are not accepted, but there is one in so many steps.
PROPOSING, LONGEST_STRIDE = 0.01, 16
# Upper ends of ranges of the match's length, and the share of drafts that is accepted before any is seen.
MATCHES = (1, 2, 3, 5, 8, 16)
PRIOR_RATES = (0.3, 0.45, 0.6, 0.75, 0.85, 0.92, 0.96)
PRIOR_WEIGHT = 3.0
KEPT = 0.97  # of earlier outcomes, with each new one
# Steps with drafts after which one without is measured again, and as long as only one was measured.
LONGEST_RUN, FIRST_RUN = 64, 6
LEAST_SLOPE = 0.01  # time of one more token, of that of a step without drafts, at least


@dataclass
class Draft:
    """Draft tokens. `scores`: (1, vocab) that each was drawn from, if the draft was sampled. `matched`: tokens of the
    match; `shares`: how often each token followed, of all times."""

    tokens: list[int] = field(default_factory=list[int])
    scores: list[Array] = field(default_factory=list[Array])
    matched: int = 0
    shares: list[float] = field(default_factory=list[float])

    def cut(self, count: int) -> Draft:
        """The first `count` tokens."""
        if count >= len(self.tokens):
            return self
        return Draft(self.tokens[:count], self.scores[:count], self.matched, self.shares[:count])


class StepCosts:
    """The time of a step by its number of tokens: the least of recent steps, since other work only adds to it."""

    def __init__(self) -> None:
        self._recent: dict[int, deque[float]] = {}
        self._seconds: dict[int, float] = {}
        self._sure: set[int] = set()  # sizes that were measured often enough
        self._sorted: list[int] = []
        self._sorted_sure: list[int] = []
        self._latest: dict[int, int] = {}  # the number of the last step of a size
        self._steps = 0

    def seen(self, tokens: int, seconds: float, *, drafted: bool = False) -> None:
        """A step took so long. `drafted`: with drafts."""
        size = _size(tokens)
        self._latest[size] = self._steps = self._steps + 1
        if self._steps % FORGETTING == 0:
            self._forget()
        recent = self._recent.get(size)
        plausible = not drafted or (
            size not in self._sure and seconds <= PLAUSIBLE * self._time(tokens, self._sorted_sure)
        )
        if recent is None:
            recent = self._recent[size] = deque(maxlen=RECENT)
            if drafted and self._seconds:  # one time alone may be that of a compilation or an interruption
                self._seconds[size] = min(seconds, MOST_SURPRISE * self._time(tokens, self._sorted))
        recent.append(seconds)
        if len(recent) > 1 or size not in self._seconds:
            self._seconds[size] = min(recent)
        if size not in self._sorted:
            insort(self._sorted, size)
        if plausible or len(recent) >= SURE_TIMES:
            if size not in self._sure:
                insort(self._sorted_sure, size)
            self._sure.add(size)

    def _forget(self) -> None:
        """Drop sizes without recent steps: since then the sequences, or the machine's load, may have changed."""
        for size in [size for size, step in self._latest.items() if self._steps - step > FORGETTING]:
            del self._latest[size], self._recent[size], self._seconds[size]
            self._sure.discard(size)
        self._sorted, self._sorted_sure = sorted(self._seconds), sorted(self._sure)

    def known(self, tokens: int) -> bool:
        """Whether steps of that size have been measured."""
        return _size(tokens) in self._recent

    def times(self, tokens: int) -> int:
        """How many steps of that size count."""
        return len(self._recent.get(_size(tokens), ()))

    def limit(self, base: int) -> int:
        """The number of tokens that may be added to a step of `base`: a few times what was measured."""
        return max(FIRST_DRAFT, GROWTH * (max(self._sure, default=0) - base))

    def ratio(self, base: int, tokens: int, *, hopeful: bool = False) -> float:
        """The time of a step of `tokens`, divided by that of one of `base`; at least `LEAST_SLOPE` for each token more,
        divided by `base`. `hopeful`: as extrapolated where few steps were measured and these took longer."""
        if tokens <= base:
            return 1.0
        first, least = self._time(base, self._sorted), 1 + LEAST_SLOPE * (tokens - base) / base
        found = self._time(tokens, self._sorted)
        if hopeful and _size(tokens) not in self._sure:
            found = min(found, self._time(tokens, self._sorted_sure))
        return max(least, found / first) if first > 0 else least

    def _time(self, tokens: int, known: list[int]) -> float:
        """Seconds by the times of these sizes, in order; without any a multiple of seconds."""
        if not known:
            return _prior(tokens)
        size = _size(tokens)
        at = bisect_left(known, size)
        # A larger step takes no less time.
        above = min((self._seconds[other] for other in known[at:]), default=math.inf)
        if at < len(known) and known[at] == size:
            return above
        if at == 0:
            return above * _prior(tokens) / _prior(known[0])
        low = known[at - 1]
        below = min(self._seconds[low], above)
        if at < len(known):  # between two
            return below + (above - below) * (size - low) / (known[at] - low)
        slope = (below - self._seconds[known[0]]) / (low - known[0]) if low > known[0] else 0.0
        return max(below * _prior(tokens) / _prior(low), below + slope * (tokens - low))


def _size(tokens: int) -> int:
    if tokens <= 16:
        return tokens
    at = min(bisect_left(SIZES, tokens), len(SIZES) - 1)
    return SIZES[at - 1] if SIZES[at] - tokens > tokens - SIZES[at - 1] else SIZES[at]


def _prior(tokens: int) -> float:
    return 1 + PRIOR_SLOPE * (tokens - 1)


class Acceptance:
    """The share of draft tokens that is accepted, by the length of the match, of one sequence or of several."""

    def __init__(self, parent: Acceptance | None = None) -> None:
        """`parent`: of several sequences, from which this one starts and which learns from it."""
        self.parent = parent
        self._trials = [0.0] * len(PRIOR_RATES)
        self._accepted = [0.0] * len(PRIOR_RATES)
        self._wait = self._pause = FIRST_WAIT

    def rate(self, matched: int) -> float:
        """The probability that a token is accepted that always followed a match of that length."""
        return self._rate(bisect_left(MATCHES, matched))

    def _rate(self, at: int) -> float:
        before = PRIOR_RATES[at] if self.parent is None else self.parent._rate(at)
        found = (self._accepted[at] + PRIOR_WEIGHT * before) / (self._trials[at] + PRIOR_WEIGHT)
        return min(0.99, found)

    def chances(self, draft: Draft) -> list[float]:
        """For each token of a draft, the probability that it and all before it are accepted, if it is not tiny."""
        found: list[float] = []
        chance, matched = 1.0, draft.matched
        for share in draft.shares:
            chance *= share * self.rate(matched)
            if chance < LEAST_CHANCE:
                break
            matched += 1
            found.append(chance)
        return found

    def expected(self, draft: Draft) -> float:
        """The expected number of accepted tokens."""
        return sum(self.chances(draft))

    def waited(self) -> None:
        """One more step."""
        self._wait -= 1

    @property
    def due(self) -> bool:
        """Whether a draft should be tried although it is not expected to save time."""
        return self._wait <= 0

    def learn(self, draft: Draft, verified: int, accepted: int) -> None:
        """Of a draft's tokens, `verified` were compared with the model's, and `accepted` were equal."""
        for at in range(min(verified, len(draft.shares))):
            self._learn(bisect_left(MATCHES, draft.matched + at), draft.shares[at], at < accepted)
        if verified:
            self._pause = FIRST_WAIT if accepted else min(LONGEST_WAIT, 2 * self._pause)
            self._wait = self._pause

    def _learn(self, at: int, share: float, accepted: bool) -> None:
        self._trials[at] = KEPT * self._trials[at] + share
        self._accepted[at] = KEPT * self._accepted[at] + accepted
        if self.parent is not None:
            self.parent._learn(at, share, accepted)


class DraftRule:
    """The lengths of drafts in the steps of one run."""

    def __init__(self) -> None:
        self.costs = StepCosts()
        self.balance = START
        self._run = 0  # steps with drafts since one without
        self._proposing = self._step = 0.0  # seconds of the proposals for a step, and of a step

    def lengths(
        self, drafts: Sequence[Draft], acceptances: Sequence[Acceptance], base: int, rows: int
    ) -> list[int]:
        """How many tokens of each draft to verify in a step of `base` tokens without drafts, which gives a new token to
        each of `rows` sequences. None as long as steps of that size are not measured."""
        lengths = [0] * len(drafts)
        measured = self.costs.known(base) and self._run < (
            LONGEST_RUN if self.costs.times(base) > 1 else FIRST_RUN
        )
        if not measured or self.balance <= 0 or not any(draft.tokens for draft in drafts):
            return lengths
        each = [acceptance.chances(draft) for draft, acceptance in zip(drafts, acceptances, strict=True)]
        due = [bool(draft.tokens) and own.due for draft, own in zip(drafts, acceptances, strict=True)]
        if sum(map(sum, each)) < (MARGIN - 1) * rows and not any(due):
            return lengths
        # Chances decrease within a draft, so that a sequence's tokens stay in order.
        order = sorted(
            ((chance, -at, row) for row, chances in enumerate(each) for at, chance in enumerate(chances)),
            reverse=True,
        )
        count, best, tokens = 0, MARGIN * rows, float(rows)
        for index, (chance, _, _) in enumerate(order[: self.costs.limit(base)], start=1):
            tokens += chance
            cost = self.costs.ratio(base, base + index, hopeful=True)
            if cost - 1 > self.balance:
                break
            if tokens / cost > best:
                count, best = index, tokens / cost
        for _, _, row in order[:count]:
            lengths[row] += 1
        for row, tried in enumerate(due):
            if tried and not lengths[row]:
                if self.costs.ratio(base, base + count + 1, hopeful=True) - 1 > self.balance:
                    break
                lengths[row], count = 1, count + 1
        return lengths

    @property
    def stride(self) -> int:
        """Steps for one proposal where drafts are not accepted: proposals take at most `PROPOSING` of the time."""
        if not self._step:
            return 1
        return max(1, min(LONGEST_STRIDE, math.ceil(self._proposing / (PROPOSING * self._step))))

    def proposed(self, seconds: float) -> None:
        """The proposals for a step took so long."""
        self._proposing = (
            seconds
            if not self._proposing
            else 0.8 * self._proposing + 0.2 * min(seconds, 4 * self._proposing)
        )

    def stepped(self, base: int, drafted: int, rows: int, accepted: int, seconds: float) -> None:
        """A step of `base` tokens and `drafted` ones took so long; `accepted` of these were."""
        self.costs.seen(base + drafted, seconds, drafted=drafted > 0)
        self._run = self._run + 1 if drafted else 0
        self._step = seconds if not self._step else min(seconds, 1.1 * self._step)
        gain = accepted / max(1, rows) - (self.costs.ratio(base, base + drafted, hopeful=True) - 1)
        self.balance = max(LOWEST, min(HIGHEST, self.balance + RATE + gain))
