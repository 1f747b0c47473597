"""The evaluation of examples, for the trainer and for `monoblock evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from monoblock.training.tasks.base import Evaluated, Example, Task


def evaluate(
    learner: Any,
    task: Task,
    examples: Sequence[Example],
    batch_size: int,
    show: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """The mean loss of examples, and the task's metrics. Batches are of examples of similar length."""
    # Random inputs are the same in each evaluation.
    examples = [
        task.drawn(example, np.random.default_rng([task.options.seed % 2**64, 2**33, i]))
        for i, example in enumerate(examples)
    ]
    order = sorted(range(len(examples)), key=lambda i: examples[i].tokens)
    found: dict[int, Evaluated] = {}
    total, count = 0.0, 0
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        loss, outputs = learner.evaluate([examples[i] for i in batch])
        total += loss
        count += sum(task.weight(examples[i]) for i in batch)
        found |= {i: Evaluated(examples[i], out) for i, out in zip(batch, outputs, strict=True)}
        if show is not None:
            show(len(found))
    mean = total / max(1, count)
    return {"loss": mean, **task.metrics([found[i] for i in range(len(examples))], mean)}
