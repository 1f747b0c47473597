"""A step of the learners of JAX and TensorFlow: accumulation, clipping, and numbers that are not finite."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from monoblock.backends.xla.learner import LearnerBase
from monoblock.training.tasks.base import NotFinite


class FakeLearner(LearnerBase):
    """Each batch has a number, which is its loss and its gradient."""

    def __init__(self, limit: float) -> None:
        self.task: Any = SimpleNamespace(weight=lambda example: 1)
        self.options: Any = SimpleNamespace(max_grad_norm=limit)
        self.updates: list[tuple[float, float, float]] = []

    def inputs(self, batch: Any) -> Any:
        return batch

    def gradients(self, batch: Any, count: int, number: int) -> tuple[float, Any]:
        return batch[0][0] / count, min(batch[0][0], 1e300)

    def add(self, one: Any, other: Any) -> Any:
        return one + other

    def norm(self, gradients: Any) -> float:
        return abs(gradients)

    def update(self, gradients: Any, factor: float, learning_rate: float) -> None:
        self.updates.append((gradients, factor, learning_rate))


def units(*numbers: float) -> Any:
    return [[[number]] for number in numbers]


@pytest.mark.parametrize(("limit", "factor"), [(1.0, 0.25), (5.0, 1.0), (0.0, 1.0)])
def test_gradients_are_added_and_clipped(limit: float, factor: float) -> None:
    learner = FakeLearner(limit)
    assert learner.step(units(3.0, 1.0), 0.5) == (2.0, 4.0)
    assert learner.updates == [(4.0, pytest.approx(factor, rel=1e-6), 0.5)]


def test_weights_do_not_change_if_a_number_is_not_finite() -> None:
    learner = FakeLearner(1.0)
    with pytest.raises(NotFinite, match="the loss is inf") as error:
        learner.step(units(1.0, math.inf), 0.5)
    assert error.value.batch == 1
    learner.norm = lambda gradients: math.nan
    with pytest.raises(NotFinite, match="norm of the gradients is nan"):
        learner.step(units(1.0), 0.5)
    assert learner.updates == []
