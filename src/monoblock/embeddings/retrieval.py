"""Search, pairs and clusters of embeddings: `semantic_search`, `paraphrase_mining`, `community_detection`."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from monoblock.embeddings.arrays import HOST, Array, EmbeddingOps
from monoblock.embeddings.similarity import cos_sim, ops_for
from monoblock.pipelines.progress import with_progress_bar

Score = Callable[[Any, Any], Array]


def _matrix(ops: EmbeddingOps, values: Any, name: str) -> Array:
    found = ops.array(values)
    found = found[None] if found.ndim == 1 and len(found) else found
    if found.ndim != 2:
        raise ValueError(f"{name} has the shape {list(found.shape)}; expected [n, width]")
    return found


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: expected an integer of at least 1")
    return value


def semantic_search(
    query_embeddings: Any,
    corpus_embeddings: Any,
    query_chunk_size: int = 100,
    corpus_chunk_size: int = 500000,
    top_k: int = 10,
    score_function: Score = cos_sim,
) -> list[list[dict[str, Any]]]:
    """For each query, the `top_k` texts of the corpus with the highest scores, best first.

    Embeddings are [n, width]. Returns a list per query of {"corpus_id": index, "score": number}; of equal scores, the
    first texts come first. `score_function(queries, corpus)` returns [queries, corpus]; the chunk sizes limit the size
    of its result.
    """
    for name, value in (("query_chunk_size", query_chunk_size), ("corpus_chunk_size", corpus_chunk_size)):
        _positive(name, value)
    _positive("top_k", top_k)
    ops = ops_for(query_embeddings, corpus_embeddings)
    queries = _matrix(ops, query_embeddings, "query_embeddings")
    corpus = _matrix(ops, corpus_embeddings, "corpus_embeddings")
    if getattr(queries, "device", None) != (device := getattr(corpus, "device", None)):
        queries = queries.to(device)
    found: list[list[tuple[float, int]]] = [[] for _ in range(len(queries))]
    for first, start, scores in _blocks(queries, corpus, query_chunk_size, corpus_chunk_size, score_function):
        values, indices = _ops_of(scores).top(scores, top_k)
        for row, (some, where) in enumerate(zip(values, indices, strict=True)):
            pairs = [(-score, start + index) for score, index in zip(some, where, strict=True)]
            found[first + row] = heapq.nsmallest(top_k, [*found[first + row], *pairs])
    return [[{"corpus_id": index, "score": -score} for score, index in row] for row in found]


def _ops_of(array: Any) -> EmbeddingOps:
    return ops_for(array) if hasattr(array, "detach") else HOST


def _blocks(
    queries: Array, corpus: Array, rows: int, columns: int, score_function: Score
) -> Iterator[tuple[int, int, Array]]:
    """The scores in blocks, with the indices of their first row and column."""
    for first in range(0, len(queries), rows):
        for start in range(0, len(corpus), columns):
            yield first, start, score_function(queries[first : first + rows], corpus[start : start + columns])


def paraphrase_mining(
    model: Any,
    sentences: Sequence[str],
    show_progress_bar: bool = False,
    batch_size: int = 32,
    query_chunk_size: int = 5000,
    corpus_chunk_size: int = 100000,
    max_pairs: int = 500000,
    top_k: int = 100,
    score_function: Score = cos_sim,
    truncate_dim: int | None = None,
    prompt_name: str | None = None,
    prompt: str | None = None,
) -> list[list[float | int]]:
    """The pairs of texts with the highest scores, [score, i, j] with i < j, best first.

    The texts are encoded by `model`; the other arguments are those of `paraphrase_mining_embeddings`.
    """
    embeddings = model.encode(
        sentences,
        show_progress_bar=show_progress_bar,
        batch_size=batch_size,
        convert_to_tensor=True,
        truncate_dim=truncate_dim,
        prompt_name=prompt_name,
        prompt=prompt,
    )
    return paraphrase_mining_embeddings(
        embeddings, query_chunk_size, corpus_chunk_size, max_pairs, top_k, score_function
    )


def paraphrase_mining_embeddings(
    embeddings: Any,
    query_chunk_size: int = 5000,
    corpus_chunk_size: int = 100000,
    max_pairs: int = 500000,
    top_k: int = 100,
    score_function: Score = cos_sim,
) -> list[list[float | int]]:
    """The `max_pairs` pairs of embeddings with the highest scores, [score, i, j] with i < j, best first.

    The candidates are each text with the `top_k` other texts that have the best scores with it. `score_function` must
    be symmetric. The chunk sizes limit the size of its result.
    """
    _positive("query_chunk_size", query_chunk_size)
    _positive("max_pairs", max_pairs)
    _positive("top_k", top_k)
    matrix = _matrix(ops_for(embeddings), embeddings, "embeddings")
    queue: list[tuple[float, int, int]] = []
    queued: set[tuple[int, int]] = set()
    for first in range(0, len(matrix), query_chunk_size):
        # One more than top_k, as a text is among its own best.
        best = semantic_search(
            matrix[first : first + query_chunk_size],
            matrix,
            query_chunk_size,
            corpus_chunk_size,
            top_k + 1,
            score_function,
        )
        for i, row in enumerate(best, first):
            others = [(hit["score"], hit["corpus_id"]) for hit in row if hit["corpus_id"] != i]
            for score, j in others[:top_k]:
                pair = (min(i, j), max(i, j))
                if pair in queued or (len(queue) == max_pairs and score <= queue[0][0]):
                    continue
                queued.add(pair)
                if len(queue) < max_pairs:
                    heapq.heappush(queue, (score, *pair))
                else:
                    queued.discard(heapq.heappushpop(queue, (score, *pair))[1:])
    return [[score, i, j] for score, i, j in sorted(queue, key=lambda pair: pair[0], reverse=True)]


def community_detection(
    embeddings: Any,
    threshold: float = 0.75,
    min_community_size: int = 10,
    batch_size: int = 1024,
    show_progress_bar: bool = False,
) -> list[list[int]]:
    """Clusters of embeddings: lists of indices, the largest first, each with its central text first.

    The candidates are each text with all texts whose cosine with it is at least `threshold`, by decreasing cosine. From
    the largest on, candidates whose central text is in an earlier cluster are dropped, texts of earlier clusters are
    removed, and clusters below `min_community_size` are dropped. `batch_size`: texts per block of cosines.
    """
    _positive("min_community_size", min_community_size)
    _positive("batch_size", batch_size)
    if len(embeddings) < min_community_size:
        return []
    ops = ops_for(embeddings)
    matrix = ops.normalized(_matrix(ops, embeddings, "embeddings"))
    blocks = iter(range(0, len(matrix), batch_size))
    candidates: list[tuple[int, np.ndarray]] = []
    for start in with_progress_bar(blocks, -(-len(matrix) // batch_size), bool(show_progress_bar)):
        scores = HOST.array(ops.product(matrix[start : start + batch_size], matrix))
        close = scores >= np.float32(threshold)
        for row in np.flatnonzero(close.sum(axis=1) >= min_community_size).tolist():
            members = np.flatnonzero(close[row])
            candidates.append((start + row, members[np.argsort(-scores[row, members], kind="stable")]))
    candidates.sort(key=lambda candidate: len(candidate[1]), reverse=True)
    used = np.zeros(len(matrix), bool)
    found: list[list[int]] = []
    for centre, members in candidates:
        rest = members[~used[members]]
        if not used[centre] and len(rest) >= min_community_size:
            found.append([centre, *rest[rest != centre].tolist()])
            used[found[-1]] = True
    return sorted(found, key=len, reverse=True)
