"""TensorFlow models with the weights of PyTorch models, and inputs for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mpt_pairs
import numpy as np
import tensorflow as tf
import tiny_families
import torch
from helpers import randomised
from measure import assert_close, rounding
from tiny_families import labels_of, model_inputs

import monoblock
from monoblock.backends.tf.classes import make_class
from monoblock.families import FAMILIES, class_names, family_of

torch.set_num_threads(1)

CLASSES = tuple(name for model_type in FAMILIES for name in class_names(model_type))
HEADS = {name: 3 if "QuestionAnswering" in name or "Token" in name else 6 for name in CLASSES}


def fields(name: str) -> dict[str, Any]:
    """The fields of a tiny two-layer config for that class."""
    if name.startswith("Mpt"):
        return {**mpt_pairs.fields(HEADS[name]), "n_layers": 2}
    kind = tiny_families.CLASSES[name]
    return tiny_families.fields(kind, HEADS[name], **tiny_families.TWO_LAYERS[kind])


def pair(name: str, folder: Path, **more: Any) -> tuple[Any, Any]:
    """A random PyTorch model, and the TensorFlow model loaded from its checkpoint."""
    theirs = getattr(monoblock, name)(family_of(name).config(**{**fields(name), **more})).eval()
    return theirs, tf_copy(randomised(theirs), folder)


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


def inputs(name: str, padding: str = "none") -> dict[str, torch.Tensor]:
    """Ids and mask for a class, longer than the windows."""
    ids, mask = model_inputs(name.replace("Mpt", "Mistral"), padding)  # which has the same kinds of heads
    return {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}


def labels(name: str, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Labels for the class's loss."""
    return labels_of(name.replace("Mpt", "Mistral"), given["input_ids"], given.get("attention_mask"))


def numpy(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {key: x.numpy() for key, x in tensors.items()}


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
        name: slot.laid(tf.convert_to_tensor(found[id(slot.variable)]).numpy())
        for name, slot in model.stored_variables().items()
        if id(slot.variable) in found
    }
