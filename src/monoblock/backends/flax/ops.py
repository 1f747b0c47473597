"""Pure functions on JAX arrays: activations and positions.

Shape suffixes: b batch, q queries, k keys, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from monoblock.positions import inverse_frequencies, is_dynamic, past_position_buckets, steps
from monoblock.spec import RopeScaling, Rotary

ACT: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}

# Finite, so that a fully masked row becomes a mean instead of NaN.
LOWEST = float(np.finfo(np.float32).min)

# ---------------------------------------------------------------------------- positions


def dynamic_factor(rotary: Rotary, scaling: RopeScaling, length_b: Array) -> Array:
    """The factor (b, dim / 2) of dynamic scaling on the RoPE frequencies, for sequences of these lengths."""
    original = scaling.original_length
    ratio = jnp.maximum(length_b, original).astype(jnp.float32) / original
    growth = jnp.log(scaling.factor * ratio - (scaling.factor - 1)) * (rotary.dim / (rotary.dim - 2))
    return jnp.exp(-growth[:, None] * jnp.asarray(steps(rotary), jnp.float32))


def rotations(
    positions_bq: Array, rotary: Rotary, dtype: Any, length_b: Array | None = None
) -> tuple[Array, Array]:
    """cos and sin of the RoPE angles, each (b, 1, q, dim). Dynamic scaling depends on each row's length: `length_b`,
    else the highest position + 1."""
    inverse, factor = inverse_frequencies(rotary)
    inverse_b = jnp.asarray(inverse)[None]
    if is_dynamic(rotary):
        assert rotary.scaling is not None
        length_b = positions_bq.max(-1) + 1 if length_b is None else length_b
        inverse_b = inverse_b * dynamic_factor(rotary, rotary.scaling, length_b)
    angles = positions_bq[:, None, :, None].astype(jnp.float32) * inverse_b[:, None, None]
    angles = jnp.concatenate((angles, angles), axis=-1)
    return (jnp.cos(angles) * factor).astype(dtype), (jnp.sin(angles) * factor).astype(dtype)


def rotate(x_bhqd: Array, cos: Array, sin: Array) -> Array:
    """Apply RoPE to the first `dim` channels, whose halves a, b become (a cos - b sin, b cos + a sin)."""
    dim = cos.shape[-1]
    rotated, rest = x_bhqd[..., :dim], x_bhqd[..., dim:]
    a, b = jnp.split(rotated, 2, axis=-1)
    rotated = rotated * cos + jnp.concatenate((-b, a), axis=-1) * sin
    return jnp.concatenate((rotated, rest), axis=-1) if rest.shape[-1] else rotated


def relative_position_bucket(distance: Array, count: int, max_distance: int) -> Array:
    """T5's bucket of each distance (key - query): half of the buckets are for later keys; in each half, half are exact
    and the others grow with the logarithm up to `max_distance`."""
    clipped = jnp.minimum(jnp.abs(distance), max_distance)
    return (
        jnp.where(distance > 0, count // 2, 0)
        + jnp.asarray(past_position_buckets(count, max_distance))[clipped]
    )
