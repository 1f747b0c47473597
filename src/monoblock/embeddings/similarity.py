"""Similarities of embeddings: of all pairs [a, b], or of the pairs (a[i], b[i]).

Arguments are NumPy arrays, lists or tensors, of one vector or of several. The results are tensors if an argument is
one or if PyTorch is installed, as those of sentence-transformers are; otherwise NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from monoblock.embeddings.arrays import HOST, Array, EmbeddingOps
from monoblock.pipelines import frameworks

Similarity = Callable[[EmbeddingOps, Array, Array], Array]


def ops_for(*values: Any) -> EmbeddingOps:
    """PyTorch's operations if a value is a tensor, or all are NumPy arrays or lists and PyTorch is installed."""
    torch = frameworks.FRAMEWORKS["pt"]
    plain = all(isinstance(value, np.ndarray | np.generic | list | tuple) for value in values)
    if any(_is_tensor(value) for value in values) or (plain and torch.missing() is None):
        return torch.embedding_adapter.OPS
    return HOST


def _is_tensor(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_is_tensor(item) for item in value[:1])
    return hasattr(value, "detach")


def _rows(ops: EmbeddingOps, values: Any) -> Array:
    """At least two axes, and floating point."""
    found = ops.array(values)
    return found[None] if found.ndim == 1 else found


def _pairs(ops: EmbeddingOps, a: Any, b: Any) -> tuple[Array, Array]:
    first, second = _rows(ops, a), _rows(ops, b)
    if first.ndim != 2 or second.ndim != 2 or first.shape[-1] != second.shape[-1]:
        raise ValueError(
            f"embeddings of the shapes {list(first.shape)} and {list(second.shape)}: expected [n, width] and [m, width]"
        )
    return first, second


def _cosine(ops: EmbeddingOps, a: Array, b: Array) -> Array:
    return ops.product(ops.normalized(a), ops.normalized(b))


def _dot(ops: EmbeddingOps, a: Array, b: Array) -> Array:
    return ops.product(a, b)


def _euclidean(ops: EmbeddingOps, a: Array, b: Array) -> Array:
    return -ops.distances(a, b, 2)


def _manhattan(ops: EmbeddingOps, a: Array, b: Array) -> Array:
    return -ops.distances(a, b, 1)


def _pairwise_cosine(ops: EmbeddingOps, a: Array, b: Array) -> Array:
    return ops.sum_last(ops.normalized(a) * ops.normalized(b))


def _pairwise_dot(ops: EmbeddingOps, a: Array, b: Array) -> Array:
    return ops.sum_last(a * b)


def _pairwise_euclidean(ops: EmbeddingOps, a: Array, b: Array) -> Array:
    return -ops.sqrt(ops.sum_last((a - b) ** 2))


def _pairwise_manhattan(ops: EmbeddingOps, a: Array, b: Array) -> Array:
    return -ops.sum_last(abs(a - b))


# name -> the similarities of all pairs, and of pairs of equal index.
SIMILARITIES: dict[str, tuple[Similarity, Similarity]] = {
    "cosine": (_cosine, _pairwise_cosine),
    "dot": (_dot, _pairwise_dot),
    "euclidean": (_euclidean, _pairwise_euclidean),
    "manhattan": (_manhattan, _pairwise_manhattan),
}


def similarity_name(name: Any) -> str:
    """One of `SIMILARITIES`; enums of other libraries are compared by value."""
    found = getattr(name, "value", name)
    if found not in SIMILARITIES:
        raise ValueError(f"similarity_fn_name={name!r}: expected one of {', '.join(map(repr, SIMILARITIES))}")
    return found


def all_pairs(name: str, a: Any, b: Any, ops: EmbeddingOps | None = None) -> Array:
    """The similarities [a, b] of all pairs."""
    ops = ops or ops_for(a, b)
    return SIMILARITIES[name][0](ops, *_pairs(ops, a, b))


def of_pairs(name: str, a: Any, b: Any, ops: EmbeddingOps | None = None) -> Array:
    """The similarities of the pairs (a[i], b[i]); a number for two vectors."""
    ops = ops or ops_for(a, b)
    first, second = ops.array(a), ops.array(b)
    if first.shape != second.shape:
        raise ValueError(
            f"embeddings of the shapes {list(first.shape)} and {list(second.shape)}: expected equal ones"
        )
    return SIMILARITIES[name][1](ops, first, second)


def cos_sim(a: Any, b: Any) -> Array:
    """The cosines of all pairs, [a, b]."""
    return all_pairs("cosine", a, b)


def dot_score(a: Any, b: Any) -> Array:
    """The dot products of all pairs, [a, b]."""
    return all_pairs("dot", a, b)


def euclidean_sim(a: Any, b: Any) -> Array:
    """The negative Euclidean distances of all pairs, [a, b]."""
    return all_pairs("euclidean", a, b)


def manhattan_sim(a: Any, b: Any) -> Array:
    """The negative Manhattan distances of all pairs, [a, b]."""
    return all_pairs("manhattan", a, b)


def pairwise_cos_sim(a: Any, b: Any) -> Array:
    """The cosines of the pairs (a[i], b[i])."""
    return of_pairs("cosine", a, b)


def pairwise_dot_score(a: Any, b: Any) -> Array:
    """The dot products of the pairs (a[i], b[i])."""
    return of_pairs("dot", a, b)


def pairwise_euclidean_sim(a: Any, b: Any) -> Array:
    """The negative Euclidean distances of the pairs (a[i], b[i])."""
    return of_pairs("euclidean", a, b)


def pairwise_manhattan_sim(a: Any, b: Any) -> Array:
    """The negative Manhattan distances of the pairs (a[i], b[i])."""
    return of_pairs("manhattan", a, b)


def normalize_embeddings(embeddings: Any) -> Array:
    """Each row divided by its length."""
    ops = ops_for(embeddings)
    return ops.normalized(ops.array(embeddings))


def truncate_embeddings(embeddings: Any, truncate_dim: int | None) -> Any:
    """The first `truncate_dim` values of each vector; None: all."""
    return embeddings[..., :truncate_dim]
