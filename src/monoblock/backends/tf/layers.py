"""The layers without children: matrices, tables, norms, dropouts. Which one a role needs, the spec says."""

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

# What the seed of a dropout's mask is made of besides the call's: the embedding's number, and those of each layer.
EMBEDDED, OF_LAYER, HEAD = 0, 4, -4
PLACES = {"out_drop": 0, "layer_drop": 0, "mlp_drop": 1, "attn_drop": 2}


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


class _Quantized:
    """Keras's quantisation for subclasses of its layers, which it refuses by their type."""

    def quantize(self, mode: Any = None, type_check: bool = True, **how: Any) -> None:
        """As Keras's."""
        del type_check
        parent: Any = super()
        parent.quantize(mode, type_check=False, **how)


class Conv1D(_Quantized, keras.layers.Dense):  # pyright: ignore[reportIncompatibleMethodOverride]
    """`x @ weight + bias`, the weight (inputs, outputs) and the bias (1, outputs)."""

    def add_weight(self, *args: Any, name: Any = None, shape: Any = None, **kwargs: Any) -> Any:
        """As Keras's, by this layer's names and shapes."""
        name, shape = {"kernel": "weight"}.get(name, name), (1, *shape) if name == "bias" else shape
        return super().add_weight(*args, name=name, shape=shape, **kwargs)

    @property
    def weight(self) -> Any:
        """The matrix (inputs, outputs)."""
        return self.kernel

    @property
    def nf(self) -> int:
        """The width of what goes out."""
        return self.units

    @property
    def nx(self) -> int:
        """The width of what comes in."""
        kernel: Any = self.kernel
        return kernel.shape[0]


class Table(_Quantized, keras.layers.Embedding):  # pyright: ignore[reportIncompatibleMethodOverride]
    """An embedding whose variable is called `weight`."""

    def add_weight(self, *args: Any, name: Any = None, **kwargs: Any) -> Any:
        """As Keras's, by this layer's name."""
        return super().add_weight(*args, name={"embeddings": "weight"}.get(name, name), **kwargs)

    @property
    def weight(self) -> Any:
        """The table (rows, columns)."""
        return self.embeddings


def rows_of(table: keras.layers.Embedding) -> Tensor:
    """All rows of a table (rows, columns), as numbers again where Keras has quantised them."""
    if table.quantization_mode is None:
        return tf.convert_to_tensor(table.embeddings)
    return table(tf.range(table.input_dim))


class NormLayer(keras.layers.Layer):
    """Layer norm (`gamma`, `beta`) or RMS norm (`weight`); the statistics are computed in float32 at least, in two
    passes."""

    def __init__(self, norm: Norm, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norm = norm
        self.beta = None

    def build(self, input_shape: Any) -> None:
        """Make the weights for inputs (..., width)."""
        name = "gamma" if self.norm.kind == "layer" else "weight"
        self.factors = self.add_weight(name=name, shape=(input_shape[-1],), initializer="ones")
        setattr(self, name, self.factors)
        if self.norm.bias:
            self.beta = self.add_weight(name="beta", shape=(input_shape[-1],), initializer="zeros")

    def call(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == tf.float64 else tf.cast(x, tf.float32)
        if self.norm.kind == "layer":
            wide = wide - tf.reduce_mean(wide, axis=-1, keepdims=True)
        power = tf.reduce_mean(tf.square(wide), axis=-1, keepdims=True)
        y = wide * tf.math.rsqrt(power + self.norm.eps) * tf.cast(self.factors, wide.dtype)
        if self.beta is not None:
            y = y + tf.cast(self.beta, wide.dtype)
        return tf.cast(y, x.dtype)


class Dropout(keras.layers.Layer):
    """Dropout whose mask depends on the call's seed and the layer's place alone, so that a backward pass that computes
    a block again draws the same one."""

    def __init__(self, rate: float, place: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate, self.place = rate, place

    def call(self, x: Tensor, seed: Tensor | None = None, shift: int = 0) -> Tensor:
        return dropped(x, self.rate, seed, self.place + shift)


class Tied(keras.layers.Layer):
    """A projection to the vocabulary by the embedding's matrix (v, w)."""

    def call(self, hidden: Tensor, table: Tensor) -> Tensor:
        return tf.matmul(hidden, tf.cast(table, hidden.dtype), transpose_b=True)


@dataclass(frozen=True)
class LeafLayer:
    """A module without children, and the shape that builds it."""

    layer: Any
    shape: tuple[int | None, ...] | None = None


class Leaves:
    """Makes the layer of a role; None where the model has none of it. `table`: what the token embedding's variable is
    called."""

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
                return self._dropout(rate, OF_LAYER * (layer + 1) + PLACES[role], name)
            case _ if (
                role in roles.OPTIONAL or role == "rotary"
            ):  # what is not there, or computed without a layer
                return None
            case _:
                raise ValueError(f"no layer plays the role {role!r}")

    def _head(self, role: str, name: str) -> LeafLayer | None:
        spec, head = self.spec, self.head
        assert head is not None
        kind, summary = KINDS[head.kind], head.summary
        match role:
            case "head_out":
                outputs = head.size(spec.vocab)
                if kind.size == "vocab" and spec.tie_head:
                    return LeafLayer(Tied(name=name, dtype=self.policy))
                # The bias over the vocabulary is the part's around it.
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
        begun = initial(self.spec)
        made = kind(outputs, use_bias=bias, kernel_initializer=begun, name=name, dtype=self.policy)
        return LeafLayer(made, (None, None, inputs))

    def _rows(self, rows: int, columns: int, name: str, variable: str = "embeddings") -> LeafLayer:
        kind = keras.layers.Embedding if variable == "embeddings" else Table
        begun = initial(self.spec)
        return LeafLayer(kind(rows, columns, embeddings_initializer=begun, name=name, dtype=self.policy))

    def _norm(self, norm: Norm, width: int, name: str) -> LeafLayer:
        return LeafLayer(NormLayer(norm, name=name, dtype=self.policy), (None, None, width))

    def _dropout(self, rate: float, place: int, name: str) -> LeafLayer:
        return LeafLayer(Dropout(rate, place, name=name, dtype=self.policy))
