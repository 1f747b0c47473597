"""Transformations of the scores before a token is chosen: one pure function each.

`scores_bv` are float32 logits of the next token, `ids_bn` all tokens so far, prompt included; `keep` is the number of
likeliest tokens that a filter must leave. The functions agree with transformers 5.23's processors, except that they
ignore padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from monoblock.generation.arrays import Array, ArrayOps
from monoblock.generation.checks import MOST

NEVER = -math.inf
FLOAT32_MAX = 3.4028234663852886e38
TOP_H_CANDIDATES = 100  # the paper's implementation considers no more tokens
TINY = 1e-30  # above 0 in float32
WINDOW = 256  # tokens that top_p considers before it sorts the whole vocabulary (40 times the work at 50k)

# ---------------------------------------------------------------------- scaling and cutting a distribution


def _cut(ops: ArrayOps, scores_bv: Array, remove_bv: Array) -> Array:
    return ops.where(remove_bv, NEVER, scores_bv)


def top_k(ops: ArrayOps, scores_bv: Array, k: int, keep: int = 1) -> Array:
    """Only the k most likely tokens, and those tied with the last of them (arXiv 1805.04833)."""
    best_bk, _ = ops.top_k(scores_bv, min(max(k, keep), scores_bv.shape[-1]))
    return _cut(ops, scores_bv, scores_bv < best_bk[:, -1:])


def top_p(ops: ArrayOps, scores_bv: Array, p: float, keep: int = 1) -> Array:
    """Only the smallest set of likeliest tokens whose probabilities add up to at least p (arXiv 1904.09751)."""
    vocab = scores_bv.shape[-1]
    if vocab > WINDOW:
        best_bk, index_bk = ops.top_k(scores_bv, WINDOW)
        top_b1 = best_bk[:, :1]
        probs_bk = ops.exp(best_bk - top_b1) / ops.sum(ops.exp(scores_bv - top_b1))
        mass_bk = ops.cumsum(probs_bk)
        # The mass before the likeliest token is exactly 0, so that it survives any p.
        before_bk = mass_bk - probs_bk
        remove_bk = (before_bk >= p) & (before_bk >= TINY)
        if keep > 1:
            remove_bk = _spare_first(ops, remove_bk, keep)
        # The window decides, unless the distribution of a row is so flat that its nucleus is larger.
        return ops.choose(
            ops.all(mass_bk[:, -1] >= p),
            lambda: ops.put_along(
                ops.full_like(scores_bv, NEVER), index_bk, ops.where(remove_bk, NEVER, best_bk)
            ),
            lambda: _top_p_sorted(ops, scores_bv, p, keep),
        )
    return _top_p_sorted(ops, scores_bv, p, keep)


def _top_p_sorted(ops: ArrayOps, scores_bv: Array, p: float, keep: int) -> Array:
    vocab = scores_bv.shape[-1]
    rising_bv, index_bv = ops.sort(scores_bv)
    remove_bv = ops.cumsum(ops.softmax(rising_bv)) <= 1 - p
    remove_bv = ops.concat([remove_bv[:, :-keep], ops.mask(remove_bv.shape[0], min(keep, vocab))])
    return ops.put_along(scores_bv, index_bv, _cut(ops, rising_bv, remove_bv))


def _spare_first(ops: ArrayOps, remove_bk: Array, keep: int) -> Array:
    return ops.concat([ops.mask(remove_bk.shape[0], keep), remove_bk[:, keep:]])


def min_p(ops: ArrayOps, scores_bv: Array, p: float, keep: int = 1) -> Array:
    """Only tokens with at least p times the probability of the likeliest one (arXiv 2407.01082)."""
    if p == 0:
        return scores_bv
    # The ratio of two probabilities is the difference of their scores: no softmax over the vocabulary.
    limit_b1 = ops.max(scores_bv) + math.log(p)
    return _cut(ops, scores_bv, (scores_bv < limit_b1) & _below_best(ops, scores_bv, keep))


def _below_best(ops: ArrayOps, scores_bv: Array, keep: int) -> Array:
    """Where a score is less than the `keep` largest of its row."""
    if keep == 1:
        return scores_bv < ops.max(scores_bv)
    best_bk, _ = ops.top_k(scores_bv, min(keep, scores_bv.shape[-1]))
    return scores_bv < best_bk[:, -1:]


def top_h(ops: ArrayOps, scores_bv: Array, share: float) -> Array:
    """The likeliest tokens whose entropy terms add up to at most `share` of the entropy; at least one."""
    best_bk, index_bk = ops.top_k(scores_bv, min(TOP_H_CANDIDATES, scores_bv.shape[-1]))
    terms_bk = _entropy_terms(ops, ops.log_softmax(best_bk))
    remove_bk = ops.cumsum(terms_bk) > ops.sum(terms_bk) * share
    kept_bk = ops.where(_spare_first(ops, remove_bk, 1), NEVER, best_bk)
    return ops.put_along(ops.full_like(scores_bv, NEVER), index_bk, kept_bk)


def _entropy_terms(ops: ArrayOps, logs_bk: Array) -> Array:
    """-p log p from log p, 0 where p is 0."""
    possible_bk = logs_bk > NEVER
    finite_bk = ops.where(possible_bk, logs_bk, 0.0)
    return ops.where(possible_bk, -finite_bk * ops.exp(finite_bk), 0.0)


def typical_p(ops: ArrayOps, scores_bv: Array, mass: float, keep: int = 1) -> Array:
    """The tokens whose information content is nearest to the entropy, up to that mass (arXiv 2202.00666)."""
    logs_bv = ops.log_softmax(scores_bv)
    distance_bv = ops.abs(-logs_bv - ops.sum(_entropy_terms(ops, logs_bv)))
    rising_bv, index_bv = ops.sort(distance_bv)
    mass_bv = ops.cumsum(ops.softmax(ops.take_along(scores_bv, index_bv)))
    count_b1 = ops.sum(mass_bv < mass)
    last_b1 = ops.where(count_b1 < scores_bv.shape[-1], count_b1, scores_bv.shape[-1] - 1)
    remove_bv = _spare_first(ops, rising_bv > ops.take_along(rising_bv, last_b1), keep)
    return _cut(ops, scores_bv, ops.put_along(remove_bv, index_bv, remove_bv))


def epsilon_cutoff(ops: ArrayOps, scores_bv: Array, epsilon: float, keep: int = 1) -> Array:
    """Only tokens with at least that probability (arXiv 2210.15191)."""
    return _cut(ops, scores_bv, (ops.softmax(scores_bv) < epsilon) & _below_best(ops, scores_bv, keep))


def eta_cutoff(ops: ArrayOps, scores_bv: Array, epsilon: float, keep: int = 1) -> Array:
    """Epsilon cutoff with the threshold min(epsilon, sqrt(epsilon) exp(-entropy)) (arXiv 2210.15191)."""
    logs_bv = ops.log_softmax(scores_bv)
    scaled_b1 = ops.exp(-ops.sum(_entropy_terms(ops, logs_bv))) * math.sqrt(epsilon)
    limit_b1 = ops.where(scaled_b1 < epsilon, scaled_b1, epsilon)
    return _cut(ops, scores_bv, (ops.exp(logs_bv) < limit_b1) & _below_best(ops, scores_bv, keep))


# ---------------------------------------------------------------------- repeated, banned and forced tokens


def _marked(ops: ArrayOps, index_bk: Array, chosen_bk: Array | None, vocab: int) -> Array:
    """A mask (rows, vocab) of the chosen indices; those outside the vocabulary are ignored."""
    inside_bk = index_bk < vocab
    chosen_bk = inside_bk if chosen_bk is None else inside_bk & chosen_bk
    index_bk = ops.where(chosen_bk, index_bk, vocab)
    return ops.put_along(ops.mask(index_bk.shape[0], vocab + 1), index_bk, True)[:, :vocab]


def repetition_penalty(
    ops: ArrayOps, scores_bv: Array, ids_bn: Array, penalty: float, valid_bn: Array | None = None
) -> Array:
    """Positive scores of tokens in `ids` divided by the penalty, negative ones multiplied (arXiv 1909.05858)."""
    present_bv = _marked(ops, ids_bn, valid_bn, scores_bv.shape[-1])
    return ops.where(
        present_bv, ops.where(scores_bv < 0, scores_bv * penalty, scores_bv / penalty), scores_bv
    )


def ban_ngrams(
    ops: ArrayOps,
    scores_bv: Array,
    ids_bn: Array,
    size: int,
    source_bm: Array,
    valid_bm: Array | None = None,
) -> Array:
    """Ban tokens that would complete, at the end of `ids`, an n-gram of that size which occurs in `source`."""
    windows = source_bm.shape[1] - size + 1
    length = ids_bn.shape[1]
    if windows < 1 or length < size - 1:
        return scores_bv
    last_bw = source_bm[:, size - 1 :]
    match_bw = last_bw == last_bw
    for offset in range(size - 1):
        position = length - size + 1 + offset
        match_bw = match_bw & (source_bm[:, offset : offset + windows] == ids_bn[:, position : position + 1])
    for offset in range(size if valid_bm is not None else 0):
        match_bw = match_bw & cast(Any, valid_bm)[:, offset : offset + windows]
    return _cut(ops, scores_bv, _marked(ops, last_bw, match_bw, scores_bv.shape[-1]))


class SequenceBias:
    """Adds a bias to the last token of each sequence when the tokens so far end with the tokens before it."""

    def __init__(self, ops: ArrayOps, biases: Mapping[tuple[int, ...], float]):
        self.ops = ops
        self.largest = max(max(sequence) for sequence in biases)
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for sequence in biases:
            by_length.setdefault(len(sequence), []).append(sequence)
        self.groups = [
            (
                length - 1,
                ops.array([sequence[:-1] for sequence in group]) if length > 1 else None,
                ops.array([[sequence[-1] for sequence in group]]),
                ops.array([[float(biases[sequence]) for sequence in group]]),
            )
            for length, group in by_length.items()
        ]

    def __call__(self, ids_bn: Array, scores_bv: Array) -> Array:
        if self.largest >= scores_bv.shape[-1]:
            raise ValueError(
                f"a biased or banned sequence holds token {self.largest}, but the vocabulary ends at "
                f"{scores_bv.shape[-1] - 1}"
            )
        ops, rows = self.ops, ids_bn.shape[0]
        total_bv = ops.full_like(scores_bv, 0.0)
        for before, prefixes_wp, last_1w, bias_1w in self.groups:
            if before > ids_bn.shape[1]:
                continue
            every = ops.array([0] * rows)
            last_bw, bias_bw = ops.take_rows(last_1w, every), ops.take_rows(bias_1w, every)
            if prefixes_wp is not None:
                match_bw = ops.all(ids_bn[:, None, -before:] == prefixes_wp[None])
                bias_bw = ops.where(match_bw, bias_bw, 0.0)
            total_bv = ops.add_along(total_bv, last_bw, bias_bw)
        return scores_bv + total_bv


def only(ops: ArrayOps, scores_bv: Array, index_k: Array) -> Array:
    """Score 0 for these tokens, -inf for all others."""
    return ops.fill_columns(ops.full_like(scores_bv, NEVER), index_k, 0.0)


def allowed_only(
    ops: ArrayOps,
    scores_bv: Array,
    ids_bn: Array,
    allowed: Callable[[int, Array], Sequence[int]],
    copies: int = 1,
) -> Array:
    """Only the tokens that `allowed(prompt index, ids so far)` returns for each row; `copies` rows per prompt.

    Where all of them have the score -inf in every copy of a prompt, they get equal scores instead.
    """
    rows, vocab = scores_bv.shape
    named: list[list[int]] = []
    for row in range(rows):
        tokens = [int(id) for id in allowed(row // copies, ids_bn[row])]
        if not tokens or min(tokens) < 0 or max(tokens) >= vocab:
            raise ValueError(
                f"prefix_allowed_tokens_fn must return at least one id from 0 to {vocab - 1}, got {tokens} for "
                f"prompt {row // copies}"
            )
        named.append(tokens)
    longest = max(len(tokens) for tokens in named)
    index_bk = ops.array([tokens + tokens[-1:] * (longest - len(tokens)) for tokens in named])
    mask_bv = ops.put_along(ops.full_like(scores_bv, NEVER), index_bk, 0.0)
    allowed_bv = scores_bv + mask_bv
    possible = [best > NEVER for [best] in ops.to_list(ops.max(allowed_bv))]
    impossible = [not any(possible[row // copies * copies :][:copies]) for row in range(rows)]
    return (
        ops.where(ops.array([[blocked] for blocked in impossible]), mask_bv, allowed_bv)
        if any(impossible)
        else allowed_bv
    )


def remove_invalid(ops: ArrayOps, scores_bv: Array) -> Array:
    """NaN becomes 0, infinities the largest finite numbers of float32."""
    scores_bv = ops.where(scores_bv != scores_bv, 0.0, scores_bv)
    scores_bv = ops.where(scores_bv == math.inf, FLOAT32_MAX, scores_bv)
    return ops.where(scores_bv == NEVER, -FLOAT32_MAX, scores_bv)


def power(ops: ArrayOps, base: float, exponent: Any) -> Any:
    """base ** exponent, at most MOST, since inf times a score of 0 is NaN. `exponent`: an int or a device scalar."""
    if not isinstance(exponent, int):
        grown = base**exponent
        return ops.where(grown < MOST, grown, MOST)
    return MOST if exponent * math.log(base) > math.log(MOST) else base**exponent


def raise_columns(ops: ArrayOps, scores_bv: Array, index_k: Array, factor: float) -> Array:
    """Add |score| * factor to these columns; infinite scores stay."""
    grown_bv = scores_bv + ops.abs(scores_bv) * factor
    finite_bv = (scores_bv < math.inf) & (scores_bv > NEVER)
    raised_bv = ops.fill_columns(ops.full_like(scores_bv, 0.0), index_k, 1.0) > 0
    return ops.where(raised_bv & finite_bv, grown_bv, scores_bv)
