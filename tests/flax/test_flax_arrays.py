"""Tokenizers and processors with arrays of JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from arrays_checked import of_processors, of_tokenizers


def test_ids_and_masks() -> None:
    of_tokenizers("jax", jax.Array, jnp.int32)


def test_images() -> None:
    of_processors("jax", jax.Array)
