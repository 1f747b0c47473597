"""TensorFlow's functions for the code that both frameworks share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from monoblock.backends.tf.ops import Tensor, after, size
from monoblock.backends.xla.namespace import Size


class TfNamespace:
    """`Namespace` for TensorFlow; each method is the protocol's."""

    def values(self, x: Tensor, *, wait: bool = False) -> np.ndarray[Any, Any] | None:
        if not hasattr(x, "numpy") or not tf.executing_eagerly():
            return None
        return x.numpy() if wait or "CPU" in (x.device or "CPU") else None

    def size(self, x: Tensor, axis: int) -> Size:
        return size(x, axis)

    def int32(self, x: Any) -> Tensor:
        return tf.cast(x, tf.int32)

    def full(self, shape: tuple[Size, ...], value: int | bool) -> Tensor:
        return tf.fill(shape, value)

    def arange(self, count: Size) -> Tensor:
        return tf.range(count)

    def where(self, condition: Tensor, x: Any, y: Any) -> Tensor:
        return tf.where(condition, x, y)

    def minimum(self, x: Any, y: Any) -> Tensor:
        return tf.minimum(x, y)

    def maximum(self, x: Any, y: Any) -> Tensor:
        return tf.maximum(x, y)

    def cumsum(self, x: Tensor) -> Tensor:
        return tf.cumsum(x, axis=-1)

    def first_true(self, x: Tensor) -> Tensor:
        return tf.argmax(tf.cast(x, tf.int32), axis=-1, output_type=tf.int32)[..., None]

    def reshape(self, x: Tensor, shape: tuple[Size, ...]) -> Tensor:
        return tf.reshape(x, shape)

    def pad(self, x: Tensor, before: Size, after: Size) -> Tensor:
        return tf.pad(x, ((0, 0), (before, after)))

    def concat(self, parts: Sequence[Tensor]) -> Tensor:
        return tf.concat(list(parts), axis=0)

    def columns(self, x: Tensor, first: Any, count: Size) -> Tensor:
        return after(x, first, count, 1)


XP = TfNamespace()
