"""Tokenizers and processors with return_tensors="jax"."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from return_tensors_checks import check_processor, check_tokenizer


def test_ids_and_masks() -> None:
    check_tokenizer("jax", jax.Array, jnp.int32)


def test_images() -> None:
    check_processor("jax", jax.Array)
