"""What the trainer needs of JAX and TensorFlow, as far as both share it: batches, steps, evaluation, the model's files.

A framework's learner defines the methods that raise NotImplementedError here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import monoblock
from monoblock.seeds import set_seed
from monoblock.training.options import TrainingOptions
from monoblock.training.padding import pad_id, padded
from monoblock.training.processes import Processes
from monoblock.training.tasks.base import Example, NotFinite, Task

STATE = "training"  # the subfolder of a checkpoint with the optimizer's state
_TINY = 1e-6  # added to the norm that gradients are clipped by, as PyTorch does

Units = Sequence[Sequence[Example]]
Batch = dict[str, np.ndarray]


class LearnerBase:
    """A model that is trained, or only evaluated (`train=False`), in float32. The arguments are those of PyTorch's
    `Learner`."""

    prefix: ClassVar[str]  # of the names of the framework's classes

    def __init__(
        self,
        task: Task,
        options: TrainingOptions,
        fields: Mapping[str, Any],
        *,
        source: str,
        base: str,
        train: bool = True,
        processes: Processes | None = None,
    ) -> None:
        del base  # there is no adapter
        self.task, self.options = task, options
        self.processes: Any = processes or Processes()
        set_seed(options.seed)
        self.tokenizer = task.tokenizer
        self.pad = pad_id(self.tokenizer)
        how: dict[str, Any] = {"dtype": "float32", **options.hub(source)}
        if fields:  # a head for other labels is initialised
            how["ignore_mismatched_sizes"] = True
        auto = getattr(monoblock, f"{self.prefix}{task.auto}")
        self.model: Any = self.load(auto, source, {**how, **fields})
        if options.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.prepare(train)

    def load(self, auto: Any, source: str, how: Mapping[str, Any]) -> Any:
        """The model, by `auto.from_pretrained(source, **how)` on the options' device."""
        raise NotImplementedError

    def prepare(self, train: bool) -> None:
        """Create what steps and evaluations need; with `train` also the optimizer."""
        raise NotImplementedError

    # ------------------------------------------------------------------ steps

    def step(self, units: Sequence[Units], learning_rate: float) -> tuple[float, float]:
        """One step over batches of rows: the mean loss, and the gradients' norm before clipping. NotFinite, before the
        weights change: one of them is no finite number."""
        count = max(1, sum(self.task.weight(e) for batch in units for unit in batch for e in unit))
        values, gradients = list[float](), None
        for number, batch in enumerate(units):
            value, found = self.batch_gradients(batch, count, number)
            gradients = found if gradients is None else self.add(gradients, found)
            values.append(value)
        values, gradients = self.summed(values, gradients)
        for number, value in enumerate(values):
            if not math.isfinite(value):
                raise NotFinite(f"the loss is {value}", number)
        norm = self.norm(gradients)
        if not math.isfinite(norm):
            raise NotFinite(f"the norm of the gradients is {norm}")
        limit = self.options.max_grad_norm
        self.update(gradients, min(1.0, limit / (norm + _TINY)) if limit else 1.0, learning_rate)
        return sum(values), norm

    def batch_gradients(self, batch: Units, count: int, number: int) -> tuple[float, Any]:
        """`gradients` of a batch, or of the rows of it that this process computes."""
        return self.gradients(self.inputs(batch), count, number)

    def summed(self, values: list[float], gradients: Any) -> tuple[list[float], Any]:
        """The losses of the batches, and their gradients, summed over the processes that divide the rows."""
        return values, gradients

    def gradients(self, batch: Batch, count: int, number: int) -> tuple[float, Any]:
        """The sum of the losses of a step's batch `number`, divided by `count`, and its gradients. Dropout depends on
        the seed, the step and the number only."""
        raise NotImplementedError

    def add(self, one: Any, other: Any) -> Any:
        """The sums of two batches' gradients."""
        raise NotImplementedError

    def norm(self, gradients: Any) -> float:
        """The norm of all gradients."""
        raise NotImplementedError

    def update(self, gradients: Any, factor: float, learning_rate: float) -> None:
        """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with the gradients times `factor`:
        p - learning_rate * (m / (sqrt(v) + eps) + decay * p), where m and v are without their bias towards 0."""
        raise NotImplementedError

    def length(self, longest: int) -> int:
        """The number of tokens to which a batch is padded."""
        return longest

    def inputs(self, batch: Units) -> Batch:
        """Arrays of a batch: input_ids, attention_mask, labels."""
        rows = [[row for example in unit for row in example.rows] for unit in batch]
        longest = max(sum(len(text.ids) for text in row) for row in rows)
        found = padded(rows, self.pad, self.length(longest))
        labels = found.labels
        if labels is None:
            labels = np.array([unit[0].target for unit in batch])
        kind = np.float32 if labels.dtype.kind == "f" else np.int32
        return {
            "input_ids": found.ids.astype(np.int32),
            "attention_mask": found.mask.astype(np.int32),
            "labels": labels.astype(kind),
        }

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, examples: Sequence[Example]) -> tuple[float, list[Any]]:
        """The sum of the losses of a batch, and the outputs of each example that the task needs."""
        loss, logits = self.outputs(self.inputs([[example] for example in examples]))
        if self.task.outputs != "logits":
            return float(loss), [None] * len(examples)
        return float(loss), list(np.asarray(logits))

    def outputs(self, batch: Batch) -> tuple[Any, Any]:
        """The sum of the losses of a batch, and the logits, or None if the task does not need them."""
        raise NotImplementedError

    def generate(self, ids: Sequence[int], tokens: int) -> list[int]:
        """The ids, at most `tokens`, that continue a prompt, each the most probable one."""
        found = self.generated(
            np.array([list(ids)], np.int32),
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.pad,
        )
        return np.asarray(getattr(found, "sequences", found))[0, len(ids) :].tolist()

    def generated(self, ids: np.ndarray, **options: Any) -> Any:
        """The result of the model's `generate`."""
        raise NotImplementedError

    # ------------------------------------------------------------------ files

    def save(self, folder: Path) -> None:
        """Write the model and the tokenizer, in the first process. All processes call it."""
        if self.processes.first:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def finish(self) -> None:
        """There is no adapter to merge."""


class Written:
    """The end of a save that has ended already, as `SharedCheckpoints` expects it."""

    def done(self) -> bool:
        """The files are written."""
        return True

    def result(self) -> None:
        """There is nothing to wait for."""
