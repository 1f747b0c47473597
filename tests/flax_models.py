"""Two-layer models of every class in PyTorch and Flax with the same weights."""

from __future__ import annotations

import functools
from typing import Any

import helpers
import jax.numpy as jnp
import numpy as np
import tiny_families
from tiny_families import LABELS

import monoblock
from monoblock.families import FAMILIES, class_names, family_of

CLASSES = tuple(name for model_type in FAMILIES for name in class_names(model_type))


def config_of(name: str, **more: Any) -> Any:
    """A tiny config for a class, with a non-default value in each field."""
    if name.startswith("Mpt"):
        return helpers.config(num_labels=LABELS, **more)
    kind = tiny_families.CLASSES[name]
    return family_of(name).config(**tiny_families.fields(kind, **{**tiny_families.TWO_LAYERS[kind], **more}))


@functools.cache
def torch_model(name: str) -> Any:
    """A random PyTorch model of that class."""
    return helpers.randomised(getattr(monoblock, name)(config_of(name))).eval()


@functools.cache
def flax_model(name: str) -> Any:
    """The same model in Flax."""
    theirs = torch_model(name)
    model = getattr(monoblock, "Flax" + name)(config_of(name))
    state = {key: tensor.detach().numpy() for key, tensor in theirs.hub_state_dict().items()}
    model.params = model.params_from_hub(state)
    return model


def ids_of(rows: int = 2, tokens: int = 7, seed: int = 0) -> np.ndarray:
    """Random ids without the special tokens."""
    return np.random.default_rng(seed).integers(10, tiny_families.VOCAB, (rows, tokens))


def same_bits(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether two dicts of arrays hold the same names, dtypes and bytes."""
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and np.array_equal(one[name], two[name]) for name in one
    )


def as_float(x: Any) -> np.ndarray:
    """Any JAX array as NumPy float32."""
    return np.asarray(jnp.asarray(x, jnp.float32))
