"""Tokenizers and processors with tensors of TensorFlow."""

from __future__ import annotations

import tensorflow as tf
from arrays_checked import of_processors, of_tokenizers


def test_ids_and_masks() -> None:
    of_tokenizers("tf", tf.Tensor, tf.int32)


def test_images() -> None:
    of_processors("tf", tf.Tensor)
