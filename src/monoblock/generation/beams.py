"""Beam search: for each prompt, the texts of the highest probability among those that a narrow search meets.

Each step takes the likeliest continuations of all beams of a prompt together, twice as many as beams (more with
several eos tokens), so that enough remain when the best of them end. A text that ends among the first `num_beams`
competes by log-probability / new tokens ** length_penalty for a place in the result. Scores stay float32 on the
model's device; what is chosen from them is kept on the host. The rules, ties included, are transformers'.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from monoblock.generation.arrays import Array
from monoblock.generation.checks import LEAST, MOST
from monoblock.generation.config import GenerationConfig
from monoblock.generation.outputs import GeneratedSequences
from monoblock.generation.preparation import GenerationRun

# Instead of log 0, where a sum must stay comparable. No text that can be met is half as unlikely.
HOPELESS = -1e9


@dataclass(frozen=True)
class Beam:
    """New tokens, the rows of the batch that they were chosen from, and the score."""

    score: float
    tokens: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rules:
    """What decides between beams, from the config."""

    width: int
    length_penalty: float
    early_stopping: bool | str
    longest: int  # new tokens

    @classmethod
    def of(cls, config: GenerationConfig, longest: int) -> Rules:
        """The rules of a resolved config."""
        penalty = 1.0 if config.length_penalty is None else float(config.length_penalty)
        return cls(config.num_beams or 1, penalty, config.early_stopping or False, longest)

    def norm(self, length: int) -> float:
        """length ** length_penalty, kept where scores over it are float32 numbers."""
        power = self.length_penalty * math.log(length)
        if power > math.log(MOST):
            return MOST
        return LEAST if power < math.log(LEAST) else length**self.length_penalty

    def normed(self, scores_k: NDArray[np.float32], length: int) -> NDArray[np.float32]:
        """Scores by which texts of that many new tokens compete."""
        return scores_k / self.norm(length)


class BeamSearch:
    """The beams of one prompt: those that go on, and the best that have ended."""

    def __init__(self, rules: Rules, first_row: int):
        self.rules, self.first_row = rules, first_row
        # All beams are the prompt: only the first one's continuations count at first.
        self.running = [Beam(HOPELESS if place else 0.0) for place in range(rules.width)]
        self.ended: list[Beam] = []
        self.open = True  # whether a running beam may still come among the best

    @property
    def full(self) -> bool:
        """Whether as many texts have ended as are searched for."""
        return len(self.ended) >= self.rules.width

    def advance(
        self, scores_k: NDArray[np.float32], parents: list[int], tokens: list[int], ends_k: NDArray[np.bool_]
    ) -> None:
        """Go on with candidates k: each a parent among the running beams and a token; `ends_k`: it ends there."""
        width, length = self.rules.width, len(self.running[0].tokens) + 1
        normed_k = self.rules.normed(scores_k, length)

        def beam(place: int, scores: NDArray[np.float32]) -> Beam:
            parent = self.running[parents[place]]
            row = self.first_row + parents[place]
            return Beam(float(scores[place]), (*parent.tokens, tokens[place]), (*parent.rows, row))

        if self.open and not (self.full and self.rules.early_stopping is True):
            first = range(min(width, len(tokens)))
            ends = [place for place in first if ends_k[place] and scores_k[place] > HOPELESS / 2]
            self.ended += [beam(place, normed_k) for place in ends]
            self.ended = sorted(self.ended, key=lambda ended: -ended.score)[:width]
        going_k = scores_k + np.where(ends_k, np.float32(HOPELESS), np.float32(0))
        best = np.argsort(-going_k, kind="stable")[:width]
        self.running = [beam(int(place), going_k) for place in best]
        self.open = self.open and self._may_improve(going_k[best[:1]], length)

    def _may_improve(self, best_1: NDArray[np.float32], length: int) -> bool:
        if not self.full:
            return True
        # A long text may gain by its length; "never" waits until no length could help.
        far = self.rules.early_stopping == "never" and self.rules.length_penalty > 0
        reach = self.rules.normed(best_1, self.rules.longest if far else length)
        return bool(reach[0] > np.float32(self.ended[-1].score))

    def parents(self) -> list[int]:
        """The row that each running beam goes on from."""
        return [beam.rows[-1] for beam in self.running]

    def best(self, count: int) -> list[Beam]:
        """The best texts; empty ones where nothing possible was met."""
        return (self.ended + [Beam(HOPELESS)] * count)[:count]


def run(generation: GenerationRun) -> Any:
    """Beam search, greedy or sampled, over all prompts of the call."""
    ops, plan, decoder = generation.ops, generation.plan, generation.decoder
    rules = Rules.of(generation.config, plan.new_tokens)
    searches = [BeamSearch(rules, prompt * rules.width) for prompt in range(plan.batch)]
    text, record, logits_bv = generation.begin()
    for left in range(plan.new_tokens - 1, -1, -1):
        beams = [beam for search in searches for beam in search.running]
        logs_bv = generation.processed(ops.log_softmax(logits_bv), _ids_of(generation, text, beams))
        record.choice(logits_bv, logs_bv)
        values, places = _candidates(generation, logs_bv, beams)
        parents: list[list[int]] = (places // generation.vocab).tolist()
        tokens: list[list[int]] = (places % generation.vocab).tolist()
        texts = _Candidates(text, searches, parents, tokens)
        rows = texts.rows() if generation.criteria else []
        ends = generation.ended(texts.last(), rows, lambda rows=rows: ops.array(rows), record)
        ends_pk = np.array(ends).reshape(values.shape) | (left == 0)
        for prompt, search in enumerate(searches):
            search.advance(values[prompt], parents[prompt], tokens[prompt], ends_pk[prompt])
        enough = rules.early_stopping is True and all(search.full for search in searches)
        if ends_pk.all() or enough or not any(search.open for search in searches):
            break
        generation.reorder([row for search in searches for row in search.parents()])
        logits_bv = decoder.step(
            ops.array([[beam.tokens[-1]] for search in searches for beam in search.running])
        )
        record.forward(decoder)
    count = generation.config.num_return_sequences or 1
    return output(generation, [beam for search in searches for beam in search.best(count)], record)


def _ids_of(generation: GenerationRun, text: GeneratedSequences, beams: list[Beam]) -> Callable[[], Array]:
    """The texts of the running beams, for processors."""
    new = [list(beam.tokens) for beam in beams]
    prompt_bn = text.ids()
    return lambda: generation.ops.concat([prompt_bn, generation.ops.array(new)]) if new[0] else prompt_bn


def _candidates(
    generation: GenerationRun, logs_bv: Array, beams: list[Beam]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Log-probabilities (prompts, k) of the likeliest continuations, or of drawn ones, and their places among all
    of a prompt's."""
    ops, plan = generation.ops, generation.plan
    total_bv = logs_bv + ops.array([[beam.score] for beam in beams])
    total_pw = ops.reshape(total_bv, (plan.batch, plan.copies * generation.vocab))
    count = min(max(2, 1 + len(generation.eos)) * plan.copies, int(total_pw.shape[1]))
    if generation.config.do_sample:
        index_pk = ops.draw(total_pw, count, generation.generator)
        values_pk = ops.take_along(total_pw, index_pk)
    else:
        values_pk, index_pk = ops.top_k(total_pw, count)
    return ops.to_numpy(values_pk), ops.to_numpy(index_pk)


@dataclass
class _Candidates:
    """All candidates of a step as texts, one row after the other."""

    text: GeneratedSequences
    searches: list[BeamSearch]
    parents: list[list[int]]
    tokens: list[list[int]]

    def last(self) -> list[int]:
        return [token for tokens in self.tokens for token in tokens]

    def rows(self) -> list[list[int]]:
        return [
            [*self.text.rows[search.first_row], *search.running[parent].tokens, token]
            for search, parents, tokens in zip(self.searches, self.parents, self.tokens, strict=True)
            for parent, token in zip(parents, tokens, strict=True)
        ]


def output(generation: GenerationRun, best: list[Beam], record: Any) -> Any:
    """What the call gets: of each prompt as many of the best texts as it asks for."""
    ops, count = generation.ops, generation.config.num_return_sequences or 1
    longest = max(len(beam.tokens) for beam in best)

    def filled(values: tuple[int, ...], fill: int) -> list[int]:
        return [*values, *[fill] * (longest - len(values))]

    prompts_bn = ops.take_rows(generation.prompt_bn, ops.array([row // count for row in range(len(best))]))
    ids_bn = prompts_bn
    if longest:
        new = [filled(beam.tokens, generation.pad) for beam in best]
        ids_bn = ops.concat([prompts_bn, ops.array(new)])
    rows = ops.array(np.array([filled(beam.rows, -1) for beam in best], dtype=np.int64))
    scores_b = ops.array([beam.score for beam in best])
    return record.beam_output(ids_bn, scores_b, rows, cast(Any, generation.decoder))
