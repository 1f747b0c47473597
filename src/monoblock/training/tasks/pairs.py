"""`embedding`: vectors of texts near those of their positives, far from those of other texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from monoblock.field_types import brief
from monoblock.training import scores
from monoblock.training.data import Record, read_records
from monoblock.training.options import DEFAULTS
from monoblock.training.tasks.base import Evaluated, Example, Task, TokenRow


class EmbeddingTask(Task):
    """Records have an `anchor`, a `positive` and perhaps a `negative`, a text or a list of texts. The negatives of an
    anchor are those of its batch, and the positives of the batch's other anchors. Or all records of a file have a
    `score` from -1 to 1, which the cosine of `anchor` and `positive` shall be."""

    name = "embedding"
    auto = "AutoModel"
    loss = "pairs"

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._ranked = False  # whether training data is without scores

    def read(self, path: str, *, train: bool = True) -> list[Record]:
        records = read_records(path, self.reading(train))
        for record in records:
            _texts(record)
        if len(records) < 2:
            raise ValueError(f"{path}: embeddings are learnt from at least two pairs, found one")
        scored = _score(records[0]) is not None
        for record in records:
            if (_score(record) is not None) != scored:
                raise record.error("some records of the file have a 'score', others have none")
        if not scored:
            self._ranked = self._ranked or train
        elif not self._ranked and self.options.similarity_scale != DEFAULTS["similarity_scale"]:
            raise ValueError(f"{path}: similarity_scale has no effect on pairs with a score: drop it")
        return records

    def examples(self, records: Sequence[Record]) -> list[Example]:
        found: list[Example] = []
        for number, record in enumerate(records):
            encoded = self.tokenizer(_texts(record), truncation=True, max_length=self.limit, verbose=False)
            rows = tuple(TokenRow(np.array(ids, dtype=np.int32)) for ids in encoded["input_ids"])
            if not all(len(row.ids) for row in rows):
                raise record.error("a text has no tokens")
            found.append(Example(rows, record.where, number, _score(record)))
        return found

    def metrics(self, results: Sequence[Evaluated], loss: float) -> dict[str, float]:
        del loss
        examples = [result.example for result in results]
        vectors = [result.outputs[1] for result in results]
        if examples[0].target is not None:
            found = {"spearman": _rank_correlation(examples, vectors)}
            for width in self.options.widths:
                found[f"spearman_{width}"] = _rank_correlation(examples, [x[:, :width] for x in vectors])
            return found
        found = {"accuracy": float(np.mean([result.outputs[0] for result in results]))}
        found |= _retrieval(examples, vectors)
        for width in self.options.widths:
            found[f"mrr_{width}"] = _retrieval(examples, [x[:, :width] for x in vectors])["mrr"]
        return found


def _rank_correlation(examples: Sequence[Example], vectors: Sequence[np.ndarray]) -> float:
    """Spearman's correlation of the pairs' cosines and scores; `vectors`: of each pair, (2, width)."""
    cosines = [float(one @ other) for one, other in map(scores.unit, vectors)]
    targets = np.array([example.target for example in examples])
    return scores.correlation(scores.ranks(np.array(cosines)), scores.ranks(targets))


def _retrieval(examples: Sequence[Example], vectors: Sequence[np.ndarray]) -> dict[str, float]:
    """The search of each anchor for its positives among all positives and negatives. Equal texts are one; an anchor
    that occurs again has several positives. `vectors`: of each example's texts, (texts, width)."""
    queries: dict[bytes, np.ndarray] = {}
    texts: dict[bytes, np.ndarray] = {}
    relevant: dict[bytes, set[bytes]] = {}
    for example, own in zip(examples, vectors, strict=True):
        anchor, positive, *negatives = (row.ids.tobytes() for row in example.rows)
        queries.setdefault(anchor, own[0])
        relevant.setdefault(anchor, set()).add(positive)
        for text, vector in zip((positive, *negatives), own[1:], strict=True):
            texts.setdefault(text, vector)
    index = {text: i for i, text in enumerate(texts)}
    return scores.retrieval(
        np.stack(list(queries.values())),
        np.stack(list(texts.values())),
        [sorted(index[text] for text in relevant[anchor]) for anchor in queries],
    )


def _score(record: Record) -> float | None:
    """The score of a pair, if it has one."""
    if not record.has("score"):
        return None
    value = record.get("score")
    try:
        found = (
            float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
        )
    except (ValueError, OverflowError):
        found = math.nan
    if not -1 <= found <= 1:
        raise record.error(
            f"'score' must be a number from -1 to 1, as cosines are, got {brief(value)}: scale the scores"
        )
    if record.has("negative"):
        raise record.error("a pair with a 'score' has no 'negative'")
    return found


def _texts(record: Record) -> list[str]:
    """Anchor, positive and negatives."""
    found = [record.text("anchor"), record.text("positive")]
    if not record.has("negative"):
        return found
    negatives = record.get("negative")
    if isinstance(negatives, str):
        return [*found, record.text("negative")]
    if not isinstance(negatives, list) or not all(isinstance(x, str) and x.strip() for x in negatives):
        raise record.error(f"'negative' must be a text or a list of texts, got {brief(negatives)}")
    return [*found, *negatives]
