"""The learning rate of each step, and the order of the data, both as functions of the number of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from monoblock.training.options import EPOCHS, TrainingOptions


@dataclass(frozen=True)
class Plan:
    """The steps of a run over `units` rows: in each epoch, all rows in another order."""

    units: int
    batch_size: int
    accumulation: int
    steps: int
    seed: int

    @classmethod
    def of(cls, options: TrainingOptions, units: int) -> Plan:
        """The plan of a run over this many rows."""
        per_epoch = _steps_of_epoch(units, options.batch_size, options.accumulation)
        steps = options.max_steps or per_epoch * (options.epochs or EPOCHS)
        return cls(units, options.batch_size, options.accumulation, steps, options.seed)

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps of an epoch; the last one may have fewer rows."""
        return _steps_of_epoch(self.units, self.batch_size, self.accumulation)

    def epoch(self, step: int) -> int:
        """The epoch (from 0) of a step (from 0)."""
        return step // self.steps_per_epoch

    def order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch, in order."""
        return np.random.default_rng([self.seed % 2**64, epoch]).permutation(self.units)

    def batches(self, step: int) -> list[list[int]]:
        """The rows of each batch of a step (from 0)."""
        order = self.order(self.epoch(step))
        first = step % self.steps_per_epoch * self.batch_size * self.accumulation
        rows = order[first : first + self.batch_size * self.accumulation].tolist()
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]


def _steps_of_epoch(units: int, batch_size: int, accumulation: int) -> int:
    return math.ceil(math.ceil(units / batch_size) / accumulation)


def learning_rate(options: TrainingOptions, step: int, steps: int) -> float:
    """The learning rate of a step (from 0) of `steps`: linear from 0 during warm-up, then by the schedule."""
    warmup = (
        options.warmup_steps if options.warmup_steps is not None else math.ceil(options.warmup_ratio * steps)
    )
    if step < warmup:
        return options.learning_rate * step / max(1, warmup)
    done = (step - warmup) / max(1, steps - warmup)
    if options.schedule == "linear":
        return options.learning_rate * max(0.0, 1 - done)
    if options.schedule == "cosine":
        return options.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * done)))
    return options.learning_rate
