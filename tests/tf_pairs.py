"""TensorFlow models with the weights of PyTorch models, and inputs for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tiny_families
import torch
from contract.models import fields, reference
from measure import assert_close, rounding

from monoblock.backends.tf.classes import make_class
from monoblock.families import family_of

torch.set_num_threads(1)


def pair(name: str, folder: Path, **more: Any) -> tuple[Any, Any]:
    """A random PyTorch model, and the TensorFlow model loaded from its checkpoint."""
    theirs = reference(name, **more)
    return theirs, tf_copy(theirs, folder)


def tf_copy(theirs: Any, folder: Path) -> Any:
    """Saves a PyTorch model and loads it with the TensorFlow class."""
    theirs.save_pretrained(folder)
    return make_class("TF" + theirs.row.name).from_pretrained(folder)


def model(name: str, **more: Any) -> Any:
    """A random TensorFlow model, with weights of the same distribution as `helpers.randomised`."""
    made = make_class("TF" + name)(family_of(name).config(**{**fields(name), **more}))
    generator = np.random.default_rng(0)
    for variable in made.trainable_variables:
        noise = generator.standard_normal(variable.shape)
        scale = variable.name in ("gamma", "weight") and len(variable.shape) == 1
        variable.assign(1 + 0.3 * noise if scale else 0.2 * noise)
    return made


def shallow(name: str, **more: Any) -> Any:
    """A random one-layer TensorFlow model, which is faster to trace."""
    return model(name, **tiny_families.ONE_LAYER[family_of(name).name], **more)


def rounding_bound(theirs: Any, out: Any) -> float:
    """The bound on TensorFlow's difference from a PyTorch output with hidden states."""
    assert "hidden_states" in out
    return rounding(theirs.spec, out)


def close(
    what: str, ours: Any, theirs: torch.Tensor, bound: float, where: torch.Tensor | None = None
) -> None:
    assert_close(what, ours, theirs.detach(), bound, where)


def file_gradients(model: Any, gradients: list[Any]) -> dict[str, np.ndarray]:
    """Gradients of `model.trainable_variables` by checkpoint name, in PyTorch's layout; without variables that have no
    gradient."""
    found = {id(v): g for v, g in zip(model.trainable_variables, gradients, strict=True) if g is not None}
    return {
        name: slot.convert(tf.convert_to_tensor(found[id(slot.variable)]).numpy())
        for name, slot in model.stored_variables().items()
        if id(slot.variable) in found
    }
