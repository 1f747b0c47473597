"""Pooling: one vector per text from the vectors of its tokens, for all frameworks.

`states` [b, s, w], `mask` [b, s] with true for tokens. Masked tokens may contain any values, also NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from monoblock.embeddings.arrays import Array, EmbeddingOps

SMALLEST = 1e-9  # of a divisor: where all tokens are masked, the vector is 0

Pool = Callable[[EmbeddingOps, Array, Array, Array], Array]


def _or_zero(ops: EmbeddingOps, vectors: Array, states: Array, mask: Array) -> Array:
    """The vectors [b, w], 0 where all tokens are masked."""
    return ops.filled(vectors[:, None], ops.numbers(mask, states)[:, -1:] > 0, 0.0)[:, 0]


def first(ops: EmbeddingOps, states: Array, mask: Array, numbers: Array) -> Array:
    """The first token's vector."""
    del numbers
    return _or_zero(ops, ops.token(states, ops.first(mask)), states, mask)


def maximum(ops: EmbeddingOps, states: Array, mask: Array, numbers: Array) -> Array:
    """The maximum of each channel."""
    del numbers
    return _or_zero(ops, ops.max_tokens(ops.filled(states, mask, float("-inf"))), states, mask)


def _count(ops: EmbeddingOps, states: Array, mask: Array) -> Array:
    return ops.at_least(ops.numbers(mask, states)[:, -1:], SMALLEST)


def mean(ops: EmbeddingOps, states: Array, mask: Array, numbers: Array) -> Array:
    """The mean of the tokens."""
    del numbers
    return ops.sum_tokens(ops.filled(states, mask, 0.0)) / _count(ops, states, mask)


def mean_sqrt(ops: EmbeddingOps, states: Array, mask: Array, numbers: Array) -> Array:
    """The sum of the tokens, divided by the square root of their number."""
    del numbers
    return ops.sum_tokens(ops.filled(states, mask, 0.0)) / ops.sqrt(_count(ops, states, mask))


def weighted_mean(ops: EmbeddingOps, states: Array, mask: Array, numbers: Array) -> Array:
    """The mean with weights 1, 2, 3, ... for the tokens of the text in order."""
    weights = ops.filled(numbers[..., None], mask, 0.0)
    total = ops.at_least(ops.sum_tokens(weights), SMALLEST)
    return ops.sum_tokens(ops.filled(states, mask, 0.0) * weights) / total


def last(ops: EmbeddingOps, states: Array, mask: Array, numbers: Array) -> Array:
    """The last token's vector."""
    del numbers
    return _or_zero(ops, ops.token(states, ops.last(mask)), states, mask)


# The names of sentence-transformers, in the order in which its old config keys concatenate them.
POOLS: dict[str, Pool] = {
    "cls": first,
    "max": maximum,
    "mean": mean,
    "mean_sqrt_len_tokens": mean_sqrt,
    "weightedmean": weighted_mean,
    "lasttoken": last,
}


def pooled(
    ops: EmbeddingOps, modes: Sequence[str], states: Array, mask: Array, prompt_length: int = 0
) -> Array:
    """The results of the modes, concatenated: [b, w * modes].

    The first `prompt_length` tokens of each text are left out; `weightedmean` counts them nevertheless.
    """
    mask = ops.mask(mask)
    numbers = ops.numbers(mask, states)
    if prompt_length:
        mask = ops.after(mask, prompt_length)
    vectors = [POOLS[mode](ops, states, mask, numbers) for mode in modes]
    return vectors[0] if len(vectors) == 1 else ops.concatenated(vectors)
