"""What a task of fine-tuning defines: its records, its examples, its head and its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from monoblock.training.data import Reading, Record
from monoblock.training.options import TrainingOptions

IGNORED = -100  # the label of a token without a loss


@dataclass(frozen=True)
class TokenRow:
    """Ids (tokens,) and, for losses of tokens, their labels (tokens,), where IGNORED means none."""

    ids: np.ndarray
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Example:
    """What is learnt from a record or a part of it: one or several rows of tokens, and the target of a whole row.
    `where`: the record's file and line. `group`: examples of one group are not divided between training and
    evaluation."""

    rows: tuple[TokenRow, ...]
    where: str
    group: int
    target: Any = None
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return sum(len(row.ids) for row in self.rows)


@dataclass(frozen=True)
class Evaluated:
    """An example with the sum of its losses, their number, and the outputs that the task asks for."""

    example: Example
    outputs: Any


class NotFinite(ValueError):
    """The loss or the gradient of a step is infinite or NaN; `batch`: the index of the step's batch, if it is known."""

    def __init__(self, message: str, batch: int | None = None) -> None:
        super().__init__(message)
        self.batch = batch


class Task:
    """The base of tasks. The methods are called in the order `read` (training data, then evaluation data), `settings`,
    `bind`, `examples`; `adopt` replaces reading training data where there is a trained model."""

    name: ClassVar[str]
    auto: ClassVar[str]  # the class that selects the model's class
    loss: ClassVar[str] = "labels"  # the form of the loss: "labels", "pairs" or "preferences"
    targets: ClassVar[tuple[str, ...]] = ("labels",)  # the model's arguments for the target of a whole row
    documents: ClassVar[bool] = False  # whether data may be text files
    outputs: ClassVar[str] = (
        ""  # what `metrics` needs of each example: "", "logits", "best" (index per token)
    )

    def __init__(self, options: TrainingOptions) -> None:
        self.options = options
        self.tokenizer: Any = None
        self.limit = 0
        self.skipped = 0  # records without anything to learn

    def read(self, path: str, *, train: bool = True) -> list[Record]:
        """The checked records of a file. ValueError names the line of a wrong one."""
        raise NotImplementedError

    def reading(self, train: bool) -> Reading:
        """How training data, or that of an evaluation, is read."""
        options = self.options
        return Reading(
            columns=options.fields_of_columns,
            train=train,
            streaming=options.streaming,
            offline=options.offline,
        )

    def settings(self) -> dict[str, Any]:
        """Fields of the model's config."""
        return {}

    def adopt(self, config: Any) -> None:
        """Take labels from the config of a trained model."""
        del config

    def bind(self, tokenizer: Any, limit: int) -> None:
        """Set the tokenizer and the greatest number of tokens of a row."""
        self.tokenizer, self.limit = tokenizer, limit

    def examples(self, records: Sequence[Record]) -> list[Example]:
        """The examples of records, in order."""
        raise NotImplementedError

    def prompt(self, text: str) -> list[int]:
        """The ids that a sample of generated text continues; for tasks that have samples."""
        raise NotImplementedError

    def drawn(self, example: Example, rng: np.random.Generator) -> Example:
        """The example of one epoch, for tasks with random inputs."""
        del rng
        return example

    def weight(self, example: Example) -> int:
        """The number of losses that an example adds to the mean: its labels of tokens, else one."""
        (row, *others) = example.rows
        return 1 if others or row.labels is None else int((row.labels != IGNORED).sum())

    def metrics(self, results: Sequence[Evaluated], loss: float) -> dict[str, float]:
        """Metrics of evaluated examples; `loss`: their mean loss."""
        del results, loss
        return {}


def shifted(ids: np.ndarray) -> np.ndarray:
    """Labels of a causal language model: the ids, without one for the first token, which nothing predicts."""
    labels = ids.astype(np.int64)
    labels[0] = IGNORED
    return labels


def perplexity(loss: float) -> float:
    """The exponential of a mean loss; infinite if it is too large."""
    return float(np.exp(loss)) if loss < 700 else float("inf")
