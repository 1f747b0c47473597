"""Which tokens of which sequences are computed in the next step, and where their keys and values are stored."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from monoblock.generation.batches import BLOCK, SequenceChunk
from monoblock.generation.draft_rule import Draft
from monoblock.serving.engine.blocks import BlockPool, blocks_for
from monoblock.serving.engine.drafting import Drafting, SequenceDrafts
from monoblock.serving.engine.options import EngineOptions
from monoblock.serving.engine.sequence import EngineSequence

SPARE = 50  # a new sequence leaves this part of the blocks free


@dataclass
class SchedulerStats:
    """Totals since the start."""

    queried: int = 0  # tokens of prompts that were looked up in the prefix cache
    hits: int = 0  # of which were in it
    preemptions: int = 0


class Scheduler:
    """Sequences that wait, and those that run.

    Every step has one token of each sequence whose prompt is complete (and its draft), and fills the rest of the step's
    tokens with prompts, the oldest first. If the cache is full, the youngest sequence gives up its blocks, and is
    computed again later; its tokens stay the same.
    """

    def __init__(
        self,
        options: EngineOptions,
        pool: BlockPool,
        divides: bool,
        drafting: Drafting,
        drafts: bool | None = None,
    ) -> None:
        """`divides`, `drafts` (by default as the former): see `BatchRunner`. Without `divides` prompts are not divided,
        blocks are not shared, and a sequence is admitted when all its tokens have room, so that it is never computed
        again."""
        self.options, self.pool, self.divides, self.drafting = options, pool, divides, drafting
        self.drafts = divides if drafts is None else drafts
        self.waiting: deque[EngineSequence] = deque()
        self.running: list[EngineSequence] = []
        self.stats = SchedulerStats()

    def add(self, sequences: Iterable[EngineSequence]) -> None:
        """New sequences wait."""
        self.waiting.extend(sequences)

    def schedule(self) -> list[tuple[EngineSequence, SequenceChunk]]:
        """The chunks of the next step."""
        budget = self.options.max_step_tokens
        planned: list[tuple[EngineSequence, SequenceChunk]] = []
        for sequence in list(self.running):
            if sequence not in self.running:  # preempted for an older one
                continue
            missing = len(sequence.tokens) - sequence.computed
            decodes = missing == 1
            count = min(missing, budget) if self.divides and not decodes else missing
            if not count:
                continue
            if not self._grow(sequence, sequence.computed + count):
                continue
            planned.append((sequence, self._chunk(sequence, count, ())))
            budget = max(0, budget - count)
        planned = [entry for entry in planned if entry[0] in self.running]
        if self.drafts:
            planned, budget = self._with_drafts(planned, budget)
        while budget > 0 and len(self.running) < self.options.max_sequences:
            sequence = next((waits for waits in self.waiting if not self._follows_a_prompt(waits)), None)
            if sequence is None or not self._admit(sequence):
                break
            self.waiting.remove(sequence)
            self.running.append(sequence)
            missing = len(sequence.tokens) - sequence.computed
            count = min(missing, budget) if self.divides else missing
            planned.append((sequence, self._chunk(sequence, count, ())))
            budget = max(0, budget - count)
        return planned

    def _with_drafts(
        self, planned: list[tuple[EngineSequence, SequenceChunk]], budget: int
    ) -> tuple[list[tuple[EngineSequence, SequenceChunk]], int]:
        """The same chunks, with the drafts of sequences whose prompts are complete, and the rest of the budget."""
        found: list[tuple[SequenceDrafts, Draft]] = []
        for sequence, chunk in planned:
            if (own := sequence.drafts) is None:
                continue
            own.draft = Draft()
            if sequence.computed + 1 == len(sequence.tokens):
                found.append(
                    (
                        own,
                        own.propose(
                            sequence.tokens, min(budget, sequence.left - 1), self.drafting.rule.stride
                        ),
                    )
                )
            else:
                own.feed(sequence.tokens[: chunk.past + len(chunk.tokens)])
        if not found:
            return planned, budget
        base = sum(len(chunk.tokens) for _, chunk in planned)
        self.drafting.choose(found, base, max(1, sum(bool(chunk.wanted) for _, chunk in planned)), budget)
        made: list[tuple[EngineSequence, SequenceChunk]] = []
        for sequence, chunk in planned:
            own = sequence.drafts
            if own is not None and own.draft.tokens:
                if self._reserve(sequence, sequence.computed + 1 + len(own.draft.tokens)):
                    chunk = self._chunk(sequence, 1, tuple(own.draft.tokens))
                    budget -= len(own.draft.tokens)
                else:
                    own.draft = Draft()
            made.append((sequence, chunk))
        return made, budget

    def _chunk(self, sequence: EngineSequence, count: int, draft: tuple[int, ...]) -> SequenceChunk:
        start = sequence.computed
        request = sequence.request
        complete = start + count == len(sequence.tokens)
        wanted = 1 + len(draft) if complete else 0
        if request.params.prompt_logprobs is not None and sequence.index == 0 and start < len(request.prompt):
            wanted = count
        return SequenceChunk(
            key=sequence.key,
            tokens=[*sequence.tokens[start : start + count], *draft],
            past=start,
            table=sequence.table,
            wanted=wanted,
            images=request.images if start < len(request.prompt) else None,
        )

    def _follows_a_prompt(self, sequence: EngineSequence) -> bool:
        """Whether another sequence of the request is computing the prompt, whose blocks this one will share."""
        if not self.divides or sequence.computed or sequence.index == 0:
            return False
        first = sequence.request.sequences[0]
        return first in self.running and first.computed < len(first.request.prompt)

    # ------------------------------------------------------------------ blocks

    def _admit(self, sequence: EngineSequence) -> bool:
        """Give a waiting sequence its blocks: known ones of its beginning, and new ones. False if there are none."""
        tokens = len(sequence.tokens)
        if not self.divides:
            tokens += sequence.left
        found: list[int] = []
        if self._may_share(sequence):
            found = self.pool.find(sequence.full_digests((len(sequence.tokens) - 1) // BLOCK))
        needed = blocks_for(tokens) - len(found)
        # Some blocks stay free, so that a new sequence does not cause preemption at once.
        spare = 1 + self.pool.count // SPARE if self.divides and self.running else 0
        new = self.pool.allocate(needed) if needed + spare <= self.pool.available else None
        if new is None:
            self.pool.release(found)
            return False
        sequence.table = found + new
        sequence.computed = len(found) * BLOCK
        sequence.registered = len(found)
        if sequence.drafts is not None:
            sequence.drafts.draft = Draft()
        if not sequence.generated:
            self.stats.queried += len(sequence.request.prompt)
            self.stats.hits += sequence.computed
            if sequence.index == 0:
                sequence.request.usage.cached = sequence.computed
        return True

    def _may_share(self, sequence: EngineSequence) -> bool:
        return self.divides and (sequence.request.params.prompt_logprobs is None or sequence.index > 0)

    def _reserve(self, sequence: EngineSequence, tokens: int) -> bool:
        """Give a running sequence blocks for so many tokens, if there are free ones."""
        new = self.pool.allocate(max(0, blocks_for(tokens) - len(sequence.table)))
        sequence.table += new or []
        return new is not None

    def _grow(self, sequence: EngineSequence, tokens: int) -> bool:
        """Give a running sequence blocks for so many tokens; preempts younger ones, at last itself."""
        missing = blocks_for(tokens) - len(sequence.table)
        while missing > 0:
            if (new := self.pool.allocate(missing)) is not None:
                sequence.table += new
                return True
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: EngineSequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.stats.preemptions += 1

    def _release(self, sequence: EngineSequence) -> None:
        self.pool.release(sequence.table)
        sequence.table, sequence.computed, sequence.registered = [], 0, 0

    def computed(self, sequence: EngineSequence, count: int) -> None:
        """So many more tokens of the sequence are in the cache; its new full blocks become known."""
        sequence.computed += count
        if not self.divides:
            return
        full = min(sequence.computed, len(sequence.tokens)) // BLOCK
        for index, digest in enumerate(
            sequence.full_digests(full)[sequence.registered :], sequence.registered
        ):
            self.pool.register(sequence.table[index], digest)
        sequence.registered = max(full, sequence.registered)

    def remove(self, sequence: EngineSequence) -> None:
        """Forget a finished sequence."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)
