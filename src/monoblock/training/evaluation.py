"""The evaluation of examples, for the trainer and for `monoblock evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from monoblock.training.processes import Processes
from monoblock.training.tasks.base import Evaluated, Example, Task


def evaluate(
    learner: Any,
    task: Task,
    examples: Sequence[Example],
    batch_size: int,
    show: Callable[[int], None] | None = None,
    processes: Processes | None = None,
) -> dict[str, float]:
    """The mean loss of examples, and the task's metrics. Batches are of examples of similar length, and divided over
    the processes."""
    processes = processes or Processes()
    # Random inputs are the same in each evaluation.
    examples = [
        task.drawn(example, np.random.default_rng([task.options.seed % 2**64, 2**33, i]))
        for i, example in enumerate(examples)
    ]
    order = sorted(range(len(examples)), key=lambda i: examples[i].tokens)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    own: dict[int, tuple[float, list[Any]]] = {}
    # Each process computes as many batches, since the weights may be divided: the last one again.
    for turn in range(-(-len(batches) // processes.rows)):
        number = min(turn * processes.rows + processes.row, len(batches) - 1)
        own[number] = learner.evaluate([examples[i] for i in batches[number]])
        if show is not None:
            show(sum(len(batches[one]) for one in own))
    collected = processes.collected(own)
    metrics: dict[str, float] = {}
    if collected is not None:
        computed = {number: result for part in collected for number, result in part.items()}
        found: dict[int, Evaluated] = {}
        total, count = 0.0, 0
        for number, batch in enumerate(batches):
            loss, outputs = computed[number]
            total += loss
            count += sum(task.weight(examples[i]) for i in batch)
            found |= {i: Evaluated(examples[i], out) for i, out in zip(batch, outputs, strict=True)}
        mean = total / max(1, count)
        metrics = {"loss": mean, **task.metrics([found[i] for i in range(len(examples))], mean)}
    return processes.agreed(metrics)
