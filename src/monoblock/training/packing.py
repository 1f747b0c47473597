"""Rows of several examples, of at most a given number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from monoblock.training.tasks.base import Example

_OPEN = 64  # rows that are filled at the same time


def packed(examples: Sequence[Example], limit: int, seed: int) -> list[list[Example]]:
    """Examples in rows: in random order, each into the fullest open row that it fits."""
    order = np.random.default_rng([seed % 2**64, len(examples)]).permutation(len(examples))
    done: list[list[Example]] = []
    rows: list[tuple[int, list[Example]]] = []  # tokens, examples
    for index in order.tolist():
        example = examples[index]
        fits = [i for i, (count, _) in enumerate(rows) if count + example.tokens <= limit]
        if fits:
            at = max(fits, key=lambda i: rows[i][0])
            count, row = rows.pop(at)
            row.append(example)
            rows.append((count + example.tokens, row))
        else:
            rows.append((example.tokens, [example]))
            if len(rows) > _OPEN:
                at = max(range(len(rows)), key=lambda i: rows[i][0])
                done.append(rows.pop(at)[1])
    return [*done, *(row for _, row in rows)]
