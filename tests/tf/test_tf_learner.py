"""`monoblock finetune --framework tf`: the contract of fine-tuning, new heads by the seed, states that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import keras
import numpy as np
import pytest
from contract.training import LearnerContract

import monoblock
from monoblock.backends.tf.learner import AdamW, TFLearner
from monoblock.errors import CheckpointError
from monoblock.seeds import set_seed


class TestTFLearner(LearnerContract):
    framework: ClassVar[str] = "tf"


def test_a_new_head_depends_on_the_seed() -> None:
    config = monoblock.MPNetConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = monoblock.TFMPNetForSequenceClassification(config)
    name, found = "classifier.out_proj.weight", list[Any]()
    for seed in (1, 1, 2):
        set_seed(seed)
        model.init_parameter(name)
        found.append(model.parameter(name))
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


def learner(**shapes: tuple[int, ...]) -> Any:
    """A learner of variables without a model, after one step."""
    made: Any = TFLearner.__new__(TFLearner)
    made.variables = {name: keras.Variable(np.ones(shape, np.float32)) for name, shape in shapes.items()}
    made.optimizer = AdamW(0.1, weight_decay=0.0)
    made.optimizer.apply([np.ones(shape, np.float32) for shape in shapes.values()], made.variables.values())
    return made


def test_states_of_other_parameters_are_refused(tmp_path: Path) -> None:
    learner(a=(2,), b=(3, 2)).save_state(tmp_path)
    fitting = learner(a=(2,), b=(3, 2))
    fitting.optimizer.apply([np.ones((2,), np.float32), np.ones((3, 2), np.float32)])
    fitting.restore(tmp_path)
    assert int(fitting.optimizer.iterations) == 1
    with pytest.raises(CheckpointError, match="no state of these parameters: b/mean"):
        learner(a=(2,)).restore(tmp_path)
    with pytest.raises(CheckpointError, match=r"b/mean is \(3, 2\) of float32, expected \(2, 3\) of float32"):
        learner(a=(2,), b=(2, 3)).restore(tmp_path)
