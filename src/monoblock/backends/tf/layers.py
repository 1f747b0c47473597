"""The parts that blocks and heads are made of: Keras's own, and a norm; and how their weights begin."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from monoblock.backends.tf.ops import Tensor
from monoblock.spec import ArchSpec, Norm

_EMPTY = contextvars.ContextVar("empty", default=False)


@contextlib.contextmanager
def empty() -> Iterator[None]:
    """Layers made here begin with zeros, which are soon overwritten, and not with random numbers."""
    token = _EMPTY.set(True)
    try:
        yield
    finally:
        _EMPTY.reset(token)


def initial(spec: ArchSpec) -> Any:
    """How matrices and tables begin: from a normal distribution of the spec's deviation."""
    return "zeros" if _EMPTY.get() else keras.initializers.RandomNormal(stddev=spec.init_std)


class Part(keras.layers.Layer):
    """A layer that knows the shapes of its weights, and so needs no input to build them."""

    def build(self, input_shape: Any = None) -> None:
        """Make the weights."""
        del input_shape
        self.make()

    def make(self) -> None:
        """Make the weights of the layer and of its parts."""
        raise NotImplementedError


class NormLayer(keras.layers.Layer):
    """Layer norm or RMS norm; the statistics are computed in float32 at least, in two passes."""

    def __init__(self, norm: Norm, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norm = norm
        self.beta = None

    def build(self, input_shape: Any) -> None:
        """Make the weights for inputs (..., width)."""
        self.gamma = self.add_weight(name="gamma", shape=(input_shape[-1],), initializer="ones")
        if self.norm.bias:
            self.beta = self.add_weight(name="beta", shape=(input_shape[-1],), initializer="zeros")

    def call(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == tf.float64 else tf.cast(x, tf.float32)
        if self.norm.kind == "layer":
            wide = wide - tf.reduce_mean(wide, axis=-1, keepdims=True)
        power = tf.reduce_mean(tf.square(wide), axis=-1, keepdims=True)
        y = wide * tf.math.rsqrt(power + self.norm.eps) * tf.cast(self.gamma, wide.dtype)
        if self.beta is not None:
            y = y + tf.cast(self.beta, wide.dtype)
        return tf.cast(y, x.dtype)


def make_linear(spec: ArchSpec, outputs: int, bias: bool, name: str, policy: Any) -> keras.layers.Dense:
    """A dense layer, begun as the spec says."""
    return keras.layers.Dense(
        outputs, use_bias=bias, kernel_initializer=initial(spec), name=name, dtype=policy
    )


def make_table(spec: ArchSpec, rows: int, columns: int, name: str, policy: Any) -> keras.layers.Embedding:
    """An embedding, begun as the spec says."""
    return keras.layers.Embedding(
        rows, columns, embeddings_initializer=initial(spec), name=name, dtype=policy
    )


def rows_of(table: keras.layers.Embedding) -> Tensor:
    """All rows of a table (rows, columns), as numbers again where Keras has quantised them."""
    if table.quantization_mode is None:
        return tf.convert_to_tensor(table.embeddings)
    return table(tf.range(table.input_dim))


class Tied(keras.layers.Layer):
    """A projection to the vocabulary by the embedding's matrix (v, w), with a bias of its own or none."""

    def __init__(self, use_bias: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.use_bias = use_bias
        self.bias = None

    def build(self, input_shape: Any) -> None:
        """Make the bias, of as many numbers as the vocabulary has ids."""
        if self.use_bias:
            self.bias = self.add_weight(name="bias", shape=input_shape, initializer="zeros")

    def call(self, hidden: Tensor, table: Tensor) -> Tensor:
        logits = tf.matmul(hidden, tf.cast(table, hidden.dtype), transpose_b=True)
        return logits if self.bias is None else logits + tf.cast(self.bias, logits.dtype)
