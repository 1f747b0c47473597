"""TensorFlow's functions for the code that both backends share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from monoblock.backends.tf.arrays import TfOps
from monoblock.backends.tf.ops import Tensor, after, cut, size
from monoblock.backends.xla.namespace import Namespace, Size


class TfNamespace(TfOps):
    """`Namespace` for TensorFlow; each method is the protocol's."""

    def values(self, x: Tensor, *, wait: bool = False) -> np.ndarray[Any, Any] | None:
        if not hasattr(x, "numpy") or not tf.executing_eagerly():
            return None
        return x.numpy() if wait or "CPU" in (x.device or "CPU") else None

    def size(self, x: Tensor, axis: int) -> Size:
        return size(x, axis)

    def int32(self, x: Any) -> Tensor:
        return tf.cast(x, tf.int32)

    def cast(self, x: Tensor, dtype: Any) -> Tensor:
        return tf.cast(x, dtype)

    def full(self, shape: tuple[Size, ...], value: int | bool) -> Tensor:
        return tf.fill(shape, value)

    def arange(self, count: Size) -> Tensor:
        return tf.range(count)

    def minimum(self, x: Any, y: Any) -> Tensor:
        return tf.minimum(x, y)

    def maximum(self, x: Any, y: Any) -> Tensor:
        return tf.maximum(x, y)

    def cumsum(self, x_bk: Tensor, axis: int = -1) -> Tensor:
        return tf.cumsum(x_bk, axis=axis)

    def sum(self, x_bk: Tensor, axis: int = -1) -> Tensor:
        x_bk = tf.cast(x_bk, tf.int64) if x_bk.dtype == tf.bool else x_bk
        return tf.reduce_sum(x_bk, axis=axis, keepdims=True)

    def mean(self, x: Tensor, axis: int) -> Tensor:
        return tf.reduce_mean(x, axis=axis, keepdims=True)

    def shifted(self, x: Tensor, by: int, axis: int) -> Tensor:
        widths = [(by if i == axis else 0, 0) for i in range(len(x.shape))]
        return cut(tf.pad(x, widths), 0, size(x, axis), axis)

    def first_true(self, x: Tensor) -> Tensor:
        return tf.expand_dims(tf.argmax(tf.cast(x, tf.int32), axis=-1, output_type=tf.int32), -1)

    def pad(self, x: Tensor, before: Size, after: Size) -> Tensor:
        return tf.pad(x, ((0, 0), (before, after)))

    def stacked(self, arrays: Sequence[Tensor]) -> Tensor:
        return tf.concat(list(arrays), axis=0)

    def gather(self, x: Tensor, index: Tensor, axis: int = 1) -> Tensor:
        return tf.gather(x, index, axis=axis)

    def cut(self, x: Tensor, first: Any, count: Size) -> Tensor:
        return cut(x, first, count, -1)

    def columns(self, x: Tensor, first: Any, count: Size) -> Tensor:
        return after(x, first, count, 1)


XP: Namespace = TfNamespace()
