"""`monoblock finetune --framework tf`: the contract of fine-tuning, and new heads by the seed."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from contract.training import LearnerContract

import monoblock
from monoblock.seeds import set_seed


class TestTFLearner(LearnerContract):
    framework: ClassVar[str] = "tf"


def test_a_new_head_depends_on_the_seed() -> None:
    config = monoblock.MPNetConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = monoblock.TFMPNetForSequenceClassification(config)
    name, found = "classifier.out_proj.weight", []
    for seed in (1, 1, 2):
        set_seed(seed)
        model.init_parameter(name)
        found.append(model.parameter(name))
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])
