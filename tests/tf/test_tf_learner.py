"""`monoblock finetune --framework tf`: the contract of fine-tuning."""

from __future__ import annotations

from typing import ClassVar

from contract.training import LearnerContract


class TestTFLearner(LearnerContract):
    framework: ClassVar[str] = "tf"
