"""`token-classification`: a label of each word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from monoblock.field_types import brief
from monoblock.training import scores
from monoblock.training.data import Record, read_records
from monoblock.training.tasks.base import IGNORED, Evaluated, Example, Task, TokenRow
from monoblock.training.tasks.labels import label_index, label_names


class TokenClassificationTask(Task):
    """Records have `tokens`, a list of words, and `tags`, a label for each. The first token of a word has its label,
    the others have none."""

    name = "token-classification"
    auto = "AutoModelForTokenClassification"
    outputs = "best"

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.names: list[str] = list(options.labels)
        self._words = str(options.text_column or "tokens")
        self._tags = str(options.label_column or "tags")

    def read(self, path: str, *, train: bool = True) -> list[Record]:
        records = read_records(path, self.reading(train))
        for record in records:
            self._check(record)
        if train and not self.names:
            tags = [tag for record in records for tag in record.values[self._tags]]
            self.names = list(records.classes.get(self._tags) or label_names(tags, path))
        for record in records:
            for tag in record.values[self._tags]:
                label_index(self.names, tag, record)
        return records

    def _check(self, record: Record) -> None:
        words, tags = record.get(self._words), record.get(self._tags)
        if not isinstance(words, list) or not words or not all(isinstance(w, str) and w for w in words):
            raise record.error(f"{self._words!r} must be a list of words, got {brief(words)}")
        known = isinstance(tags, list) and all(
            isinstance(tag, int | str) and not isinstance(tag, bool) and tag != "" for tag in tags
        )
        if not known:
            raise record.error(f"{self._tags!r} must be a list of names or integers, got {brief(tags)}")
        if len(tags) != len(words):
            raise record.error(f"there are {len(words)} words, but {len(tags)} labels")

    def settings(self) -> dict[str, Any]:
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: i for i, name in enumerate(self.names)},
        }

    def adopt(self, config: Any) -> None:
        self.names = [config.id2label[i] for i in range(config.num_labels)]

    def examples(self, records: Sequence[Record]) -> list[Example]:
        found: list[Example] = []
        for number, record in enumerate(records):
            tags = [label_index(self.names, tag, record) for tag in record.values[self._tags]]
            encoded = self.tokenizer(
                record.values[self._words],
                is_split_into_words=True,
                truncation=True,
                max_length=self.limit,
                verbose=False,
            )
            labels, before = [], None
            for word in encoded.word_ids():
                labels.append(IGNORED if word is None or word == before else tags[word])
                before = word
            if all(label == IGNORED for label in labels):
                self.skipped += 1
                continue
            row = TokenRow(np.array(encoded["input_ids"], dtype=np.int32), np.array(labels, dtype=np.int64))
            found.append(Example((row,), record.where, number))
        if not found:
            raise ValueError(f"{records[0].where}: no record has a word with tokens")
        return found

    def metrics(self, results: Sequence[Evaluated], loss: float) -> dict[str, float]:
        del loss
        pairs: list[tuple[list[str], list[str]]] = []
        for result in results:
            labels = result.example.rows[0].labels
            assert labels is not None
            at = np.flatnonzero(labels != IGNORED)
            pairs.append(([self.names[i] for i in result.outputs[at]], [self.names[i] for i in labels[at]]))
        return scores.spans(pairs)
