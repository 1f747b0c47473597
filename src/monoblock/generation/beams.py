"""Beam search: for each prompt the most probable sequences that a search of limited width finds.

Each step takes the likeliest continuations of all beams of a prompt together, twice as many as beams (more with
several eos tokens), so that enough remain when the best of them finish. A hypothesis that finishes among the first
`num_beams` competes by log-probability / new tokens ** length_penalty for a slot of the result. Scores stay float32 on
the model's device; the choices are kept on the host. The algorithm, ties included, is transformers'.
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

# Stands for log 0 where sums must stay comparable. No reachable sequence has half that log-probability.
HOPELESS = -1e9


@dataclass(frozen=True)
class Beam:
    """A hypothesis: its new tokens, the batch row that each was chosen from, and its score."""

    score: float
    tokens: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class BeamScorer:
    """The options of a beam search, from the config, and its length normalisation."""

    width: int
    length_penalty: float
    early_stopping: bool | str
    longest: int  # maximum of new tokens

    @classmethod
    def of(cls, config: GenerationConfig, longest: int) -> BeamScorer:
        """The options of a resolved config."""
        penalty = 1.0 if config.length_penalty is None else float(config.length_penalty)
        return cls(config.num_beams or 1, penalty, config.early_stopping or False, longest)

    def norm(self, length: int) -> float:
        """length ** length_penalty, clamped so that scores divided by it stay finite in float32."""
        power = self.length_penalty * math.log(length)
        if power > math.log(MOST):
            return MOST
        return LEAST if power < math.log(LEAST) else length**self.length_penalty

    def normed(self, scores_k: NDArray[np.float32], length: int) -> NDArray[np.float32]:
        """Length-normalised scores of hypotheses of `length` new tokens."""
        return scores_k / self.norm(length)


class BeamSearch:
    """The beam search of one prompt: its running beams and its best finished hypotheses."""

    def __init__(self, scorer: BeamScorer, first_row: int):
        self.scorer, self.first_row = scorer, first_row
        # All beams equal the prompt, so only the first one competes in the first step.
        self.running = [Beam(HOPELESS if index else 0.0) for index in range(scorer.width)]
        self.ended: list[Beam] = []
        self.open = True  # whether a running beam may still enter the result

    @property
    def full(self) -> bool:
        """Whether as many hypotheses have finished as there are beams."""
        return len(self.ended) >= self.scorer.width

    def advance(
        self, scores_k: NDArray[np.float32], parents: list[int], tokens: list[int], ends_k: NDArray[np.bool_]
    ) -> None:
        """Advance by candidates k: each a parent among the running beams and a token; `ends_k`: it finishes."""
        width, length = self.scorer.width, len(self.running[0].tokens) + 1
        normed_k = self.scorer.normed(scores_k, length)

        def beam(index: int, scores: NDArray[np.float32]) -> Beam:
            parent = self.running[parents[index]]
            row = self.first_row + parents[index]
            return Beam(float(scores[index]), (*parent.tokens, tokens[index]), (*parent.rows, row))

        if self.open and not (self.full and self.scorer.early_stopping is True):
            first = range(min(width, len(tokens)))
            ends = [index for index in first if ends_k[index] and scores_k[index] > HOPELESS / 2]
            self.ended += [beam(index, normed_k) for index in ends]
            self.ended = sorted(self.ended, key=lambda ended: -ended.score)[:width]
        running_k = scores_k + np.where(ends_k, np.float32(HOPELESS), np.float32(0))
        best = np.argsort(-running_k, kind="stable")[:width]
        self.running = [beam(int(index), running_k) for index in best]
        self.open = self.open and self._may_improve(running_k[best[:1]], length)

    def _may_improve(self, best_1: NDArray[np.float32], length: int) -> bool:
        if not self.full:
            return True
        # With a positive length_penalty a longer hypothesis can score higher; "never" waits for the longest possible.
        far = self.scorer.early_stopping == "never" and self.scorer.length_penalty > 0
        reach = self.scorer.normed(best_1, self.scorer.longest if far else length)
        return bool(reach[0] > np.float32(self.ended[-1].score))

    def parents(self) -> list[int]:
        """The batch row that each running beam continues."""
        return [beam.rows[-1] for beam in self.running]

    def best(self, count: int) -> list[Beam]:
        """The best hypotheses; empty ones where no hypothesis is possible."""
        return (self.ended + [Beam(HOPELESS)] * count)[:count]


def run(generation: GenerationRun) -> Any:
    """Beam search, greedy or sampled, over all prompts of the run."""
    ops, plan, decoder = generation.ops, generation.plan, generation.decoder
    scorer = BeamScorer.of(generation.config, plan.new_tokens)
    searches = [BeamSearch(scorer, prompt * scorer.width) for prompt in range(plan.batch)]
    sequences, outputs, logits_bv = generation.prefill()
    for left in range(plan.new_tokens - 1, -1, -1):
        beams = [beam for search in searches for beam in search.running]
        logs_bv = generation.processed(ops.log_softmax(logits_bv), _ids_of(generation, sequences, beams))
        outputs.add_scores(logits_bv, logs_bv)
        values, indices = _candidates(generation, logs_bv, beams)
        parents: list[list[int]] = (indices // generation.vocab).tolist()
        tokens: list[list[int]] = (indices % generation.vocab).tolist()
        candidates = _Candidates(sequences, searches, parents, tokens)
        rows = candidates.rows() if generation.criteria else []
        ends = generation.ended(candidates.last(), rows, lambda rows=rows: ops.array(rows), outputs)
        ends_pk = np.array(ends).reshape(values.shape) | (left == 0)
        for prompt, search in enumerate(searches):
            search.advance(values[prompt], parents[prompt], tokens[prompt], ends_pk[prompt])
        enough = scorer.early_stopping is True and all(search.full for search in searches)
        if ends_pk.all() or enough or not any(search.open for search in searches):
            break
        generation.reorder([row for search in searches for row in search.parents()])
        logits_bv = decoder.step(
            ops.array([[beam.tokens[-1]] for search in searches for beam in search.running])
        )
        outputs.add_forward(decoder)
    count = generation.config.num_return_sequences or 1
    return output(generation, [beam for search in searches for beam in search.best(count)], outputs)


def _ids_of(
    generation: GenerationRun, sequences: GeneratedSequences, beams: list[Beam]
) -> Callable[[], Array]:
    """The sequences of the running beams, for processors."""
    new = [list(beam.tokens) for beam in beams]
    prompt_bn = sequences.ids()
    return lambda: generation.ops.concat([prompt_bn, generation.ops.array(new)]) if new[0] else prompt_bn


def _candidates(
    generation: GenerationRun, logs_bv: Array, beams: list[Beam]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Log-probabilities (prompts, k) of the likeliest (or sampled) continuations, and their indices in the
    (beams * vocab) continuations of each prompt."""
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
    """All candidates of a step as sequences, one per row."""

    sequences: GeneratedSequences
    searches: list[BeamSearch]
    parents: list[list[int]]
    tokens: list[list[int]]

    def last(self) -> list[int]:
        return [token for tokens in self.tokens for token in tokens]

    def rows(self) -> list[list[int]]:
        return [
            [*self.sequences.rows[search.first_row], *search.running[parent].tokens, token]
            for search, parents, tokens in zip(self.searches, self.parents, self.tokens, strict=True)
            for parent, token in zip(parents, tokens, strict=True)
        ]


def output(generation: GenerationRun, best: list[Beam], outputs: Any) -> Any:
    """The return value: for each prompt the requested number of its best hypotheses."""
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
    return outputs.beam_output(ids_bn, scores_b, rows, cast(Any, generation.decoder))
