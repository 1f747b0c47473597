"""Tokenizers and processors with return_tensors="tf"."""

from __future__ import annotations

import tensorflow as tf
from return_tensors_checks import check_processor, check_tokenizer


def test_ids_and_masks() -> None:
    check_tokenizer("tf", tf.Tensor, tf.int32)


def test_images() -> None:
    check_processor("tf", tf.Tensor)
