"""`monoblock finetune --framework flax`: the contract of fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from contract.training import LearnerContract


class TestFlaxLearner(LearnerContract):
    framework: ClassVar[str] = "flax"
