"""Pipelines on TensorFlow: the contract; mixed precision."""

from __future__ import annotations

from typing import Any, ClassVar

import tensorflow as tf
from contract.pipelines import PipelinesContract

from monoblock import pipeline


class TestPipelines(PipelinesContract):
    framework, prefix = "tf", "TF"
    dtypes: ClassVar = {"bfloat16": tf.bfloat16, "float16": tf.float16, "float32": tf.float32}
    devices, cpu = (None, -1, 0, "cpu", "CPU:0", "/device:CPU:0"), "CPU:0"
    # XLA takes seconds per program: one of the generating models uses it.
    settings: ClassVar = {"OpenAIGPTLMHeadModel": {"disable_compile": True}}
    sampling: ClassVar = {"disable_compile": True}

    def weight_dtypes(self, model: Any) -> set[Any]:
        return {weight.dtype for weight in model.trainable_variables}

    def test_mixed_precision(self, classifier: str) -> None:
        mixed = pipeline(model=classifier, framework="tf", model_kwargs={"dtype": "mixed_bfloat16"})
        assert mixed.dtype == tf.bfloat16
        assert self.weight_dtypes(mixed.model) == {"float32"}
