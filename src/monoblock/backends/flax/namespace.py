"""JAX's functions for the code that both backends share; NumPy's where all operands are NumPy arrays, which compiles
nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from monoblock.backends.flax.arrays import JaxOps
from monoblock.backends.xla.namespace import Namespace, Size


def _module(*operands: Any) -> Any:
    """`jax.numpy` if an operand is a JAX array, else NumPy."""
    return jnp if any(isinstance(x, jax.Array) for x in operands) else np


class JaxNamespace(JaxOps):
    """`Namespace` for JAX; each method is the protocol's."""

    def values(self, x: Any, *, wait: bool = False) -> np.ndarray[Any, Any] | None:
        if isinstance(x, np.ndarray):
            return x
        if isinstance(x, Tracer) or not (x.is_fully_addressable or x.is_fully_replicated):
            return None
        local = wait or all(device.platform == "cpu" for device in x.devices())
        return np.asarray(x) if local else None

    def size(self, x: Any, axis: int) -> Size:
        return x.shape[axis]

    def int32(self, x: Any) -> Any:
        return x.astype(np.int32) if isinstance(x, jax.Array) else np.asarray(x, np.int32)

    def cast(self, x: Any, dtype: Any) -> Any:
        return x.astype(dtype)

    def full(self, shape: tuple[Size, ...], value: int | bool) -> Array:
        return jnp.full(shape, value, jnp.bool_ if isinstance(value, bool) else jnp.int32)

    def arange(self, count: Size) -> Array:
        return jnp.arange(count, dtype=jnp.int32)

    def minimum(self, x: Any, y: Any) -> Any:
        return _module(x, y).minimum(x, y)

    def maximum(self, x: Any, y: Any) -> Any:
        return _module(x, y).maximum(x, y)

    def cumsum(self, x_bk: Any, axis: int = -1) -> Any:
        return x_bk.cumsum(axis=axis, dtype=x_bk.dtype)

    def sum(self, x_bk: Any, axis: int = -1) -> Any:
        return x_bk.sum(axis=axis, keepdims=True)

    def mean(self, x: Any, axis: int) -> Any:
        return x.mean(axis=axis, keepdims=True)

    def shifted(self, x: Array, by: int, axis: int) -> Array:
        widths = [(by if i == axis else 0, 0) for i in range(x.ndim)]
        return lax.slice_in_dim(jnp.pad(x, widths), 0, x.shape[axis], axis=axis)

    def first_true(self, x: Any) -> Any:
        return self.int32(x.argmax(axis=-1))[..., None]

    def pad(self, x: Any, before: Size, after: Size) -> Any:
        return _module(x).pad(x, ((0, 0), (before, after)))

    def stacked(self, arrays: Sequence[Any]) -> Any:
        return _module(*arrays).concatenate(list(arrays))

    def gather(self, x: Array, index: Array, axis: int = 1) -> Array:
        return jnp.take(x, index, axis=axis)

    def cut(self, x: Array, first: Any, count: Size) -> Array:
        return lax.dynamic_slice_in_dim(x, first, count, axis=x.ndim - 1)

    def columns(self, x: Any, first: Any, count: Size) -> Array:
        return lax.dynamic_slice_in_dim(x, first, count, axis=1)


XP: Namespace = JaxNamespace()
