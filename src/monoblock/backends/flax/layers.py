"""Modules without submodules: dense layers, embeddings and norms; the spec determines the module of each role.

Linen's modules are used where they exist, so that parameters have Flax's names: `kernel` (inputs, outputs), `bias`,
`embedding`, `scale`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from monoblock import roles
from monoblock.heads import KINDS, HeadSpec
from monoblock.spec import ArchSpec, Norm


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + epsilon) * weight`, computed in float32 or wider. The parameter is named `weight`, as in
    transformers' Flax classes with their own RMS norm."""

    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scale = jnp.reciprocal(jnp.sqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.epsilon))
        return (wide * scale * weight).astype(self.dtype)


class Projection(nn.Module):
    """A dense layer; if tied (`own` is False), it multiplies by a given embedding matrix (outputs, inputs)."""

    size: int
    bias: bool
    own: bool
    std: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, table: Array | None = None) -> Array:
        bias = self.param("bias", nn.initializers.zeros, (self.size,)) if self.bias else None
        if self.own:
            kernel = self.param("kernel", nn.initializers.normal(self.std), (x.shape[-1], self.size))
            y = jnp.matmul(x.astype(self.dtype), kernel.astype(self.dtype))
        else:
            assert table is not None
            y = jnp.einsum("...w,vw->...v", x.astype(self.dtype), table.astype(self.dtype))
        return y if bias is None else y + bias.astype(self.dtype)


def own_norm(classes: Mapping[str, str]) -> bool:
    """Whether the norm class is not Linen's: its parameter is named `weight`, not `scale`."""
    return "norm" in classes


def make_norm(norm: Norm, classes: Mapping[str, str], dtype: Any) -> nn.Module:
    """The norm's module; statistics are computed in float32 or wider."""
    if norm.kind == "layer":
        return nn.LayerNorm(epsilon=norm.eps, use_bias=norm.bias, dtype=dtype, use_fast_variance=False)
    if own_norm(classes):
        return RMSNorm(norm.eps, dtype)
    return nn.RMSNorm(epsilon=norm.eps, dtype=dtype, use_fast_variance=False)


def leaf(
    role: str, spec: ArchSpec, head: HeadSpec | None, classes: Mapping[str, str], dtype: Any
) -> nn.Module | None:
    """The module of a role; None if the model has none, or if it is a function (activations, dropout)."""
    normal = nn.initializers.normal(spec.init_std)
    if (matrix := roles.matrix(role, spec, head)) is not None:
        _, outputs, bias = matrix
        return nn.Dense(outputs, use_bias=bias, dtype=dtype, kernel_init=normal)
    if (norm := roles.norm(role, spec, head)) is not None:
        return make_norm(norm[0], classes, dtype)
    if (table := roles.table(role, spec)) is not None:
        return nn.Embed(*table, dtype=dtype, embedding_init=normal)
    if role == "head_out" and head is not None:
        return projection(spec, head, KINDS[head.kind].bias, dtype)
    return None


def projection(spec: ArchSpec, head: HeadSpec, bias: bool, dtype: Any) -> Projection | None:
    """The projection of a head, without a kernel if it is tied to the embedding; None if there is none."""
    if (size := head.size(spec.vocab)) is None:
        return None
    own = not (KINDS[head.kind].size == "vocab" and spec.tie_head)
    return Projection(size, bias, own, spec.init_std, dtype)
