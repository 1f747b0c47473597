"""Layers without sublayers: dense layers, embeddings, norms, dropout; the spec determines the layer of each role."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from monoblock import roles
from monoblock.backends.tf.ops import ACT, Tensor, dropped
from monoblock.heads import KINDS, HeadSpec
from monoblock.spec import ArchSpec, Norm

_EMPTY = contextvars.ContextVar("empty", default=False)

# Indices of the dropout layers, folded into the call's seed: of the embedding, the blocks (with an offset), the head.
EMBEDDED, OF_LAYER, HEAD = 0, 4, -4
DROPOUT_INDICES = {"out_drop": 0, "layer_drop": 0, "mlp_drop": 1, "attn_drop": 2}


@contextlib.contextmanager
def empty() -> Iterator[None]:
    """Initialise layers created in this context with zeros; their weights are loaded afterwards."""
    token = _EMPTY.set(True)
    try:
        yield
    finally:
        _EMPTY.reset(token)


def initial(spec: ArchSpec) -> Any:
    """The initialiser of matrices and embeddings: a normal distribution with the spec's standard deviation."""
    return "zeros" if _EMPTY.get() else keras.initializers.RandomNormal(stddev=spec.init_std)


class _Quantized:
    """Allows Keras's quantisation for subclasses of its layers, which its type check refuses."""

    def quantize(self, mode: Any = None, type_check: bool = True, **how: Any) -> None:
        """Keras's method without the type check."""
        del type_check
        parent: Any = super()
        parent.quantize(mode, type_check=False, **how)


class Conv1D(_Quantized, keras.layers.Dense):  # pyright: ignore[reportIncompatibleMethodOverride]
    """`x @ weight + bias`, the weight (inputs, outputs) and the bias (1, outputs)."""

    def add_weight(self, *args: Any, name: Any = None, shape: Any = None, **kwargs: Any) -> Any:
        """Keras's method with this layer's names and shapes."""
        name, shape = {"kernel": "weight"}.get(name, name), (1, *shape) if name == "bias" else shape
        return super().add_weight(*args, name=name, shape=shape, **kwargs)

    @property
    def weight(self) -> Any:
        """The matrix (inputs, outputs)."""
        return self.kernel

    @property
    def nf(self) -> int:
        """The number of outputs."""
        return self.units

    @property
    def nx(self) -> int:
        """The number of inputs."""
        kernel: Any = self.kernel
        return kernel.shape[0]


class Table(_Quantized, keras.layers.Embedding):  # pyright: ignore[reportIncompatibleMethodOverride]
    """An embedding whose variable is named `weight`."""

    def add_weight(self, *args: Any, name: Any = None, **kwargs: Any) -> Any:
        """Keras's method with this layer's name."""
        return super().add_weight(*args, name={"embeddings": "weight"}.get(name, name), **kwargs)

    @property
    def weight(self) -> Any:
        """The embedding matrix (rows, columns)."""
        return self.embeddings


def rows_of(table: keras.layers.Embedding) -> Tensor:
    """The embedding matrix (rows, columns), dequantised if Keras has quantised it."""
    if table.quantization_mode is None:
        return tf.convert_to_tensor(table.embeddings)
    return table(tf.range(table.input_dim))


class NormLayer(keras.layers.Layer):
    """Layer norm (`gamma`, `beta`) or RMS norm (`weight`); statistics are computed in float32 or wider, in two
    passes."""

    def __init__(self, norm: Norm, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norm = norm
        self.beta = None

    def build(self, input_shape: Any) -> None:
        """Make the weights for inputs (..., width)."""
        name = "gamma" if self.norm.kind == "layer" else "weight"
        self.scale = self.add_weight(name=name, shape=(input_shape[-1],), initializer="ones")
        setattr(self, name, self.scale)
        if self.norm.bias:
            self.beta = self.add_weight(name="beta", shape=(input_shape[-1],), initializer="zeros")

    def call(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == tf.float64 else tf.cast(x, tf.float32)
        if self.norm.kind == "layer":
            wide = wide - tf.reduce_mean(wide, axis=-1, keepdims=True)
        variance = tf.reduce_mean(tf.square(wide), axis=-1, keepdims=True)
        y = wide * tf.math.rsqrt(variance + self.norm.eps) * tf.cast(self.scale, wide.dtype)
        if self.beta is not None:
            y = y + tf.cast(self.beta, wide.dtype)
        return tf.cast(y, x.dtype)


class Dropout(keras.layers.Layer):
    """Dropout whose mask depends only on the call's seed and the layer's index, so that gradient checkpointing
    recomputes the same mask."""

    def __init__(self, rate: float, index: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate, self.index = rate, index

    def call(self, x: Tensor, seed: Tensor | None = None, shift: int = 0) -> Tensor:
        return dropped(x, self.rate, seed, self.index + shift)


class Tied(keras.layers.Layer):
    """The projection to the vocabulary with the embedding matrix (v, w)."""

    def call(self, hidden: Tensor, table: Tensor) -> Tensor:
        return tf.matmul(hidden, tf.cast(table, hidden.dtype), transpose_b=True)


@dataclass(frozen=True)
class LeafLayer:
    """A layer without sublayers, and the input shape that builds it."""

    layer: Any
    shape: tuple[int | None, ...] | None = None


class Leaves:
    """Creates the layer of a role; None if the model has none. `table`: the name of the token embedding's variable."""

    def __init__(self, spec: ArchSpec, head: HeadSpec | None, policy: Any, table: str) -> None:
        self.spec, self.head, self.policy, self.table = spec, head, policy, table

    def __call__(self, role: str, classes: Mapping[str, str], name: str, layer: int) -> LeafLayer | None:
        spec, head, drop = self.spec, self.head, self.spec.dropout
        if (sizes := roles.matrix(role, spec, head)) is not None:
            return self._linear(*sizes, name, conv=roles.transposed(role, classes))
        if (norm := roles.norm(role, spec, head)) is not None:
            return self._norm(*norm, name)
        if (table := roles.table(role, spec)) is not None:
            return self._rows(*table, name, self.table if role == "embed" else "embeddings")
        if role.startswith("head_"):
            return self._head(role, name)
        match role:
            case "act":
                return LeafLayer(ACT[spec.mlp.act])
            case "embed_drop":
                return self._dropout(drop.embed, EMBEDDED, name)
            case "attn_drop" | "out_drop" | "mlp_drop" | "layer_drop":
                rate = drop.attention if role == "attn_drop" else drop.residual
                return self._dropout(rate, OF_LAYER * (layer + 1) + DROPOUT_INDICES[role], name)
            case _ if role in roles.OPTIONAL or role == "rotary":  # absent, or computed without a layer
                return None
            case _:
                raise ValueError(f"there is no layer for the role {role!r}")

    def _head(self, role: str, name: str) -> LeafLayer | None:
        spec, head = self.spec, self.head
        assert head is not None
        kind, summary = KINDS[head.kind], head.summary
        match role:
            case "head_out":
                outputs = head.size(spec.vocab)
                if kind.size == "vocab" and spec.tie_head:
                    return LeafLayer(Tied(name=name, dtype=self.policy))
                # The enclosing layer has the bias over the vocabulary.
                bias = kind.bias and kind.size != "vocab"
                return None if outputs is None else self._linear(spec.width, outputs, bias, name)
            case "head_drop":
                return self._dropout(head.dropout, HEAD, name)
            case "head_act":
                return LeafLayer(tf.identity if summary and not summary.tanh else tf.tanh)
            case "head_drop_in" if summary:
                return self._dropout(summary.dropout_in, HEAD + 2, name)
            case "head_drop_out" if summary:
                return self._dropout(summary.dropout_out, HEAD + 3, name)
            case _:
                return None

    def _linear(self, inputs: int, outputs: int, bias: bool, name: str, conv: bool = False) -> LeafLayer:
        kind = Conv1D if conv else keras.layers.Dense
        initializer = initial(self.spec)
        made = kind(outputs, use_bias=bias, kernel_initializer=initializer, name=name, dtype=self.policy)
        return LeafLayer(made, (None, None, inputs))

    def _rows(self, rows: int, columns: int, name: str, variable: str = "embeddings") -> LeafLayer:
        kind = keras.layers.Embedding if variable == "embeddings" else Table
        initializer = initial(self.spec)
        return LeafLayer(
            kind(rows, columns, embeddings_initializer=initializer, name=name, dtype=self.policy)
        )

    def _norm(self, norm: Norm, width: int, name: str) -> LeafLayer:
        return LeafLayer(NormLayer(norm, name=name, dtype=self.policy), (None, None, width))

    def _dropout(self, rate: float, index: int, name: str) -> LeafLayer:
        return LeafLayer(Dropout(rate, index, name=name, dtype=self.policy))
