"""Exact nearest neighbours, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

_TINY = 1e-12  # norms below count as this one, so that a zero vector has the cosine 0


def _cosine(queries: np.ndarray, block: np.ndarray) -> np.ndarray:
    return _dot(_normalized(queries), block) / np.maximum(np.linalg.norm(block, axis=1), _TINY)


def _dot(queries: np.ndarray, block: np.ndarray) -> np.ndarray:
    return queries @ block.T


def _euclidean(queries: np.ndarray, block: np.ndarray) -> np.ndarray:
    # Differences, as |q|^2 + |b|^2 - 2qb loses the digits of small distances.
    return np.stack([-np.linalg.norm(block - query, axis=1) for query in queries])


def _manhattan(queries: np.ndarray, block: np.ndarray) -> np.ndarray:
    return np.stack([-np.abs(block - query).sum(axis=1) for query in queries])


def _normalized(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), _TINY)


# (queries [q, width], block [rows, width]) -> scores [q, rows]; larger is nearer. The names are sentence-transformers'.
SIMILARITIES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "cosine": _cosine,
    "dot": _dot,
    "euclidean": _euclidean,
    "manhattan": _manhattan,
}


def nearest(
    blocks: Iterable[np.ndarray], queries: np.ndarray, count: int, similarity: str = "cosine"
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` nearest rows of all blocks for each query, or all rows if there are fewer.

    Args:
        blocks: arrays [rows, width] of float32; rows are numbered through all blocks, from 0.
        queries: [queries, width] float32.
        similarity: one of `SIMILARITIES`; distances count as negative scores.

    Returns:
        scores and rows, [queries, count], the best first; of equal scores, the lower row.
    """
    score = SIMILARITIES[similarity]
    best = np.empty((len(queries), 0), np.float32)
    where = np.empty((len(queries), 0), np.int64)
    start = 0
    for block in blocks:
        found = score(queries, block)
        numbers = np.arange(start, start + len(block))
        start += len(block)
        if found.shape[1] > count:
            found, kept = _top(found, count)
            rows = numbers[kept]
        else:
            rows = np.broadcast_to(numbers, found.shape)
        best, where = np.concatenate([best, found], 1), np.concatenate([where, rows], 1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :count]  # earlier rows stand first
        best, where = np.take_along_axis(best, order, 1), np.take_along_axis(where, order, 1)
    return best, where


def _top(scores: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest of each row and their columns, in the order of the columns; of equal ones the first."""
    columns = np.empty((len(scores), count), np.int64)
    limits = -np.partition(-scores, count - 1, axis=1)[:, count - 1]
    for row, (line, limit) in enumerate(zip(scores, limits, strict=True)):
        above = np.flatnonzero(line > limit)
        equal = np.flatnonzero(line == limit)[: count - len(above)]
        columns[row] = np.sort(np.concatenate([above, equal]))
    return np.take_along_axis(scores, columns, 1), columns
