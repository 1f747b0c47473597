"""The drafts of an engine's sequences: which tokens are verified in a step beside those that are certain."""

from __future__ import annotations

from collections.abc import Sequence

from monoblock.generation import draft_rule
from monoblock.generation.draft_rule import Acceptance, Draft, DraftRule
from monoblock.generation.drafts import LONGEST_MATCH, PromptLookup, Speculator, SuffixDrafts, speculator
from monoblock.generation.suffix_automaton import SuffixIndex
from monoblock.serving.engine.options import EngineOptions
from monoblock.serving.engine.params import SamplingParams

DEFAULT_TOKENS = 24  # of a draft at most, if a request gives no number
FED = 2048  # tokens of a sequence that one step adds to its automaton
KEPT_PROMPT = 16  # last tokens of a prompt that precede its new tokens in the index


class SequenceDrafts:
    """The drafts of one sequence. `ruled`: the rule decides how many tokens of a draft are verified."""

    def __init__(self, source: Speculator, *, ruled: bool) -> None:
        self.source, self.ruled = source, ruled
        self.draft = Draft()  # of the step that is computed
        self.fed = not isinstance(
            source.source, SuffixDrafts
        )  # whether all tokens but the last ones were read

    def feed(self, tokens: Sequence[int]) -> None:
        """Read new tokens, as many as a step has time for."""
        if isinstance(self.source.source, SuffixDrafts):
            self.fed = self.source.source.feed(tokens, FED)

    def propose(self, tokens: list[int], room: int, stride: int) -> Draft:
        """A draft of at most `room` tokens; see `Speculator.propose`."""
        if not self.fed:
            self.feed(tokens)
        return self.source.propose(tokens, room, stride if self.ruled else 1) if self.fed else Draft()

    def verified(self, accepted: int, mismatch: bool) -> None:
        """Of the step's draft so many tokens were accepted, and then one was not (`mismatch`)."""
        self.source.learn(self.draft, accepted + mismatch, accepted)


class Drafting:
    """The drafts of all sequences of an engine, and the times of its steps."""

    def __init__(self, options: EngineOptions) -> None:
        self.method, self.count = options.speculation, options.speculative_tokens or DEFAULT_TOKENS
        self.index = SuffixIndex(options.speculation_cache) if options.speculation_cache else None
        self.rule, self.rates = DraftRule(), {"suffix": Acceptance(), "lookup": Acceptance()}
        self.drafted = self.accepted = 0  # tokens, since the start
        self._base = self._rows = self._tokens = self._accepted = 0  # of the step that is computed
        self._started = 0.0
        self._measured = False

    def of(self, params: SamplingParams) -> SequenceDrafts | None:
        """The drafts of a sequence; None without any."""
        method, count = params.speculation, params.speculative_tokens
        if count == 0 or method == "off":
            return None
        if method is None and count is not None:  # always so many tokens
            return SequenceDrafts(Speculator(PromptLookup(count, LONGEST_MATCH), Acceptance()), ruled=False)
        if (method := method or self.method) == "off":
            return None
        source = speculator(method, count or self.count, parent=self.rates[method], index=self.index)
        return SequenceDrafts(source, ruled=True)

    def begin(self) -> None:
        """A step begins."""
        self._started, self._measured = draft_rule.clock(), False

    def choose(self, drafts: Sequence[tuple[SequenceDrafts, Draft]], base: int, rows: int, room: int) -> None:
        """Choose the lengths of drafts of a step of `base` tokens and `rows` new ones without them: at most `room`
        tokens together."""
        ruled = [(own, draft) for own, draft in drafts if own.ruled]
        proposed = any(draft.tokens for _, draft in ruled)
        for own, draft in drafts:
            own.draft = draft if not own.ruled else Draft()
        if ruled:
            fixed = sum(len(own.draft.tokens) for own, _ in drafts)
            lengths = self.rule.lengths(
                [draft for _, draft in ruled], [own.source.acceptance for own, _ in ruled], base + fixed, rows
            )
            for (own, draft), length in zip(ruled, lengths, strict=True):
                own.draft = draft.cut(length)
            self._measured = True
            if proposed:
                self.rule.proposed(draft_rule.clock() - self._started)
        for own, _ in drafts:
            own.draft = own.draft.cut(room)
            room -= len(own.draft.tokens)

    def planned(self, tokens: int, rows: int, drafts: Sequence[SequenceDrafts]) -> None:
        """The step has so many tokens, drafts included, and gives `rows` new ones without them."""
        ruled = sum(len(own.draft.tokens) for own in drafts if own.ruled)
        self._base, self._tokens, self._rows, self._accepted = tokens - ruled, ruled, rows, 0

    def verified(self, own: SequenceDrafts, accepted: int, mismatch: bool) -> None:
        """The draft of a sequence was verified; see `SequenceDrafts.verified`."""
        self.drafted += len(own.draft.tokens)
        self.accepted += accepted
        if own.ruled:
            own.verified(accepted, mismatch)
            self._accepted += accepted

    def end(self) -> None:
        """The step is done."""
        if self._measured:
            seconds = draft_rule.clock() - self._started
            self.rule.stepped(self._base, self._tokens, self._rows, self._accepted, seconds)

    def finished(self, own: SequenceDrafts | None, prompt: Sequence[int], tokens: Sequence[int]) -> None:
        """A sequence is finished: later ones may repeat it. `tokens`: the prompt's and the new ones."""
        if own is not None and self.index is not None and isinstance(own.source.source, SuffixDrafts):
            self.index.add(tokens[max(0, len(prompt) - KEPT_PROMPT) :])
