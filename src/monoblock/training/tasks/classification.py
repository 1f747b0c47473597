"""`classification`: one label of a text, several, or numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from monoblock.field_types import brief
from monoblock.training import scores
from monoblock.training.data import Record, read_records
from monoblock.training.tasks.base import Evaluated, Example, Task, TokenRow
from monoblock.training.tasks.labels import label_index, label_names

_PROBLEM_TYPES = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}


class ClassificationTask(Task):
    """Records have a text, optionally a second one in `text_pair`, and a label: a name or a number from 0
    (single-label), a list of these (multi-label), a number or a list of numbers (regression)."""

    name = "classification"
    auto = "AutoModelForSequenceClassification"
    outputs = "logits"

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.problem = str(options.problem)
        self.names: list[str] = list(options.labels)
        self.width = 0  # of regression
        self._text = str(options.text_column or "text")
        self._label = str(options.label_column or "label")

    def read(self, path: str, *, train: bool = True) -> list[Record]:
        records = read_records(path, self.reading(train))
        for record in records:
            record.text(self._text)
            if record.has("text_pair"):
                record.text("text_pair")
        if self.problem == "regression":
            for record in records:
                width = len(self._numbers(record))
                self.width = self.width or width
                if width != self.width:
                    raise record.error(f"expected {self.width} numbers in {self._label!r}, found {width}")
            return records
        found = [self._values(record) for record in records]
        if train and not self.names:
            classes = records.classes.get(self._label)
            self.names = list(classes or label_names([value for values in found for value in values], path))
        for record, values in zip(records, found, strict=True):
            for value in values:
                label_index(self.names, value, record)
        return records

    def settings(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"problem_type": _PROBLEM_TYPES[self.problem]}
        if self.problem == "regression":
            return {**fields, "num_labels": self.width}
        return {
            **fields,
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: i for i, name in enumerate(self.names)},
        }

    def adopt(self, config: Any) -> None:
        types = {value: name for name, value in _PROBLEM_TYPES.items()}
        self.problem = str(types.get(config.problem_type, self.problem))
        self.width = config.num_labels
        self.names = [config.id2label[i] for i in range(config.num_labels)]

    def examples(self, records: Sequence[Record]) -> list[Example]:
        found: list[Example] = []
        for number, record in enumerate(records):
            pair = record.values.get("text_pair")
            encoded = self.tokenizer(
                record.values[self._text], pair, truncation=True, max_length=self.limit, verbose=False
            )
            ids = np.array(encoded["input_ids"], dtype=np.int32)
            if not len(ids):
                raise record.error("the text has no tokens")
            found.append(Example((TokenRow(ids),), record.where, number, self._target(record)))
        return found

    def metrics(self, results: Sequence[Evaluated], loss: float) -> dict[str, float]:
        del loss
        outputs = np.stack([result.outputs for result in results])
        targets = np.stack([np.asarray(result.example.target) for result in results])
        if self.problem == "regression":
            return scores.regression(outputs, targets.reshape(outputs.shape))
        if self.problem == "multi-label":
            return scores.multi_label(outputs > 0, targets > 0)
        return scores.single_label(outputs.argmax(-1), targets, outputs.shape[-1])

    def _target(self, record: Record) -> Any:
        if self.problem == "regression":
            numbers = self._numbers(record)
            return numbers if self.width > 1 else numbers[0]
        indices = [label_index(self.names, value, record) for value in self._values(record)]
        if self.problem == "single-label":
            return indices[0]
        return [float(i in indices) for i in range(len(self.names))]

    def _values(self, record: Record) -> list[Any]:
        """The labels of a record, as names or numbers."""
        value = record.get(self._label)
        if self.problem == "multi-label":
            if isinstance(value, str):  # of a CSV file
                value = [part.strip() for part in value.split(",") if part.strip()]
            if not isinstance(value, list):
                raise record.error(f"{self._label!r} must be a list of labels, got {brief(value)}")
        values = value if isinstance(value, list) else [value]
        if self.problem == "single-label" and isinstance(value, list):
            raise record.error(
                f"{self._label!r} must be one label, got {brief(value)}; see problem=multi-label"
            )
        for one in values:
            if isinstance(one, bool) or not isinstance(one, int | str) or one == "":
                raise record.error(f"a label must be a name or an integer from 0, got {brief(one)}")
        return values

    def _numbers(self, record: Record) -> list[float]:
        value = record.get(self._label)
        try:
            numbers = [float(one) for one in (value if isinstance(value, list) else [value])]
        except (TypeError, ValueError):
            numbers = []
        if not numbers or not all(map(math.isfinite, numbers)):
            raise record.error(f"{self._label!r} must be a number or a list of numbers, got {brief(value)}")
        return numbers
