"""`monoblock.generation`'s array operations on JAX; arrays on the host stay there.

In the host loop, token ids and masks are NumPy arrays, so that growing sequences compile nothing; scores are JAX arrays
of a fixed shape. Each operation depends on its operands: NumPy's if all are NumPy arrays, else JAX's, which may be
traced (compiled loops run the same processors).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from monoblock.backends.flax.processes import on_host
from monoblock.generation.arrays import NOTHING_TO_DRAW, NumpyOps
from monoblock.seeds import signed


class PRNGKeys:
    """A random number generator: each draw splits the key as transformers' Flax classes did, so that the same key draws
    the same tokens. `can_sample`: whether all rows so far had a token to draw; None before the first draw."""

    def __init__(self, key: Array, can_sample: Array | None = None) -> None:
        self.key, self.can_sample = key, can_sample

    def next(self) -> Array:
        """A key for one draw."""
        key, self.key = jax.random.split(self.key)
        return key


def _can_sample(scores_bk: Array) -> Array:
    """A boolean scalar: whether all rows can be sampled (no NaN or +inf, and not only -inf)."""
    return jnp.isfinite(jnp.max(scores_bk, axis=-1)).all()


@jax.jit
def _sample(key: Array, scores_bv: Array) -> tuple[Array, Array, Array]:
    """A token for each row, whether all rows could be sampled, and the next key."""
    keys = PRNGKeys(key)
    return jax.random.categorical(keys.next(), scores_bv, axis=-1), _can_sample(scores_bv), keys.key


def gumbel_noise(key: Array, scores_bk: Array) -> Array:
    """Scores with Gumbel noise: their top k are k draws from the softmax without replacement."""
    return scores_bk + jax.random.gumbel(key, scores_bk.shape, scores_bk.dtype)


def on_device(x: Any) -> Any:
    """A NumPy array as a JAX array (others unchanged); cast to 32 bits on the host, which compiles nothing."""
    if not isinstance(x, np.ndarray):
        return x
    return jax.device_put(x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False))


def _all_numpy(*values: Any) -> bool:
    """Whether no value is a JAX array."""
    return not any(isinstance(value, jax.Array) for value in values)


def _traced(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)


class JaxOps(NumpyOps):
    """`ArrayOps` for JAX; see the protocol for the methods. Random draws take a `PRNGKeys`; JAX has no global one."""

    def array(self, values: Any) -> Any:
        if _traced(values):
            return values
        return super().array(on_host(values) if isinstance(values, jax.Array) else values)

    def to_numpy(self, x: Any) -> Any:
        return on_host(x)

    def to_framework(self, x: Any) -> Any:
        return on_device(x)

    def argmax(self, x_bk: Any) -> Any:
        found = super().argmax(x_bk) if _all_numpy(x_bk) else jnp.argmax(x_bk, axis=-1)
        return found if _traced(found) else on_host(found)

    def softmax(self, x_bk: Any) -> Any:
        return super().softmax(x_bk) if _all_numpy(x_bk) else jax.nn.softmax(x_bk, axis=-1)

    def log_softmax(self, x_bk: Any) -> Any:
        return super().log_softmax(x_bk) if _all_numpy(x_bk) else jax.nn.log_softmax(x_bk, axis=-1)

    def exp(self, x: Any) -> Any:
        return super().exp(x) if _all_numpy(x) else jnp.exp(x)

    def log(self, x: Any) -> Any:
        return super().log(x) if _all_numpy(x) else jnp.log(x)

    def abs(self, x: Any) -> Any:
        return super().abs(x) if _all_numpy(x) else jnp.abs(x)

    def max(self, x_bk: Any) -> Any:
        return super().max(x_bk) if _all_numpy(x_bk) else jnp.max(x_bk, axis=-1, keepdims=True)

    def sum(self, x_bk: Any) -> Any:
        return super().sum(x_bk) if _all_numpy(x_bk) else jnp.sum(x_bk, axis=-1, keepdims=True)

    def cumsum(self, x_bk: Any) -> Any:
        return super().cumsum(x_bk) if _all_numpy(x_bk) else jnp.cumsum(x_bk, axis=-1)

    def all(self, x: Any) -> Any:
        return super().all(x) if _all_numpy(x) else jnp.all(x, axis=-1)

    def sort(self, x_bk: Any) -> tuple[Any, Any]:
        if _all_numpy(x_bk):
            return super().sort(x_bk)
        index = lax.broadcasted_iota(jnp.int32, x_bk.shape, x_bk.ndim - 1)
        values, index = lax.sort((x_bk, index), num_keys=1)
        return values, index

    def top_k(self, x_bk: Any, k: int) -> tuple[Any, Any]:
        if _all_numpy(x_bk):
            return super().top_k(x_bk, k)
        values, index = lax.top_k(x_bk, k)
        return values, index

    def take_along(self, x_bv: Any, index_bk: Any) -> Any:
        if _all_numpy(x_bv, index_bk):
            return super().take_along(x_bv, index_bk)
        return jnp.take_along_axis(jnp.asarray(x_bv), index_bk, axis=-1)

    def put_along(self, x_bv: Any, index_bk: Any, values: Any) -> Any:
        if _all_numpy(x_bv, index_bk, values):
            return super().put_along(x_bv, index_bk, values)
        return jnp.asarray(x_bv).at[_row_indices(index_bk), index_bk].set(values)

    def add_along(self, x_bv: Any, index_bk: Any, values_bk: Any) -> Any:
        if _all_numpy(x_bv, index_bk, values_bk):
            return super().add_along(x_bv, index_bk, values_bk)
        return jnp.asarray(x_bv).at[_row_indices(index_bk), index_bk].add(values_bk)

    def fill_columns(self, x_bv: Any, index_k: Any, value: float) -> Any:
        if _all_numpy(x_bv, index_k):
            return super().fill_columns(x_bv, index_k, value)
        return x_bv.at[:, index_k].set(value)

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        if _all_numpy(condition, x, y):
            return super().where(condition, x, y)
        return jnp.where(condition, x, y)

    def choose(self, condition: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
        return lax.cond(condition, yes, no) if _traced(condition) else super().choose(condition, yes, no)

    def full_like(self, x: Any, value: float) -> Any:
        return super().full_like(x, value) if _all_numpy(x) else jnp.full_like(x, value)

    def take_rows(self, x: Any, index_b: Any) -> Any:
        if _all_numpy(x, index_b):
            return super().take_rows(x, index_b)
        return jnp.take(jnp.asarray(x), index_b, axis=0)

    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        return x.reshape(shape)

    def concat(self, parts: Sequence[Any]) -> Any:
        return super().concat(parts) if _all_numpy(*parts) else jnp.concatenate(list(parts), axis=1)

    def generator(self, seed: int) -> PRNGKeys:
        return PRNGKeys(jax.random.PRNGKey(signed(seed)))

    def sample(self, scores_bv: Any, generator: PRNGKeys) -> Any:
        token_b, can_sample, generator.key = _sample(generator.key, scores_bv)
        return self._check_drawn(token_b, can_sample, generator)

    def draw(self, scores_bk: Any, count: int, generator: PRNGKeys) -> Any:
        _, index_bk = lax.top_k(gumbel_noise(generator.next(), jnp.asarray(scores_bk)), count)
        return self._check_drawn(index_bk, _can_sample(jnp.asarray(scores_bk)), generator)

    def _check_drawn(self, drawn: Any, can_sample: Any, generator: PRNGKeys) -> Any:
        """The drawn indices, on the host unless traced; in a trace, the generator stores whether rows could be
        sampled."""
        if _traced(drawn):
            generator.can_sample = (
                can_sample if generator.can_sample is None else generator.can_sample & can_sample
            )
            return drawn
        if not can_sample:
            raise ValueError(NOTHING_TO_DRAW)
        return on_host(drawn)


def _row_indices(index_bk: Any) -> Any:
    return np.arange(index_bk.shape[0])[:, None]
