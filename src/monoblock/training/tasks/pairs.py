"""`embedding`: vectors of texts near those of their positives, far from those of other texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from monoblock.field_types import brief
from monoblock.training.data import Record, read_records
from monoblock.training.tasks.base import Evaluated, Example, Task, TokenRow


class EmbeddingTask(Task):
    """Records have an `anchor`, a `positive` and perhaps a `negative`, a text or a list of texts. The negatives of an
    anchor are those of its batch, and the positives of the batch's other anchors."""

    name = "embedding"
    auto = "AutoModel"
    loss = "pairs"

    def read(self, path: str, *, train: bool = True) -> list[Record]:
        del train
        records = read_records(path)
        for record in records:
            _texts(record)
        if len(records) < 2:
            raise ValueError(f"{path}: embeddings are learnt from at least two pairs, found one")
        return records

    def examples(self, records: Sequence[Record]) -> list[Example]:
        found: list[Example] = []
        for number, record in enumerate(records):
            encoded = self.tokenizer(_texts(record), truncation=True, max_length=self.limit, verbose=False)
            rows = tuple(TokenRow(np.array(ids, dtype=np.int32)) for ids in encoded["input_ids"])
            if not all(len(row.ids) for row in rows):
                raise record.error("a text has no tokens")
            found.append(Example(rows, record.where, number))
        return found

    def metrics(self, results: Sequence[Evaluated], loss: float) -> dict[str, float]:
        del loss
        return {"accuracy": float(np.mean([result.outputs for result in results]))}


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
