"""The parameter tree of Flax models equals that of transformers 4's Flax classes; classes that had no Flax version use
the names of transformers' PyTorch modules with Flax's names of leaves."""

from __future__ import annotations

from typing import Any

import flax.serialization
import numpy as np
import pytest
import torch
import transformers
import v4_checkpoints
from test_module_tree import CLASSES, theirs_of
from torch import nn

import monoblock
from monoblock.backends.flax import loading

Shapes = dict[tuple[str, ...], tuple[int, ...]]


def shapes(tree: Any) -> Shapes:
    return {path: tuple(np.shape(leaf)) for path, leaf in loading.flat(tree).items()}


def recorded(name: str) -> Shapes:
    """The tree in the file of transformers 4's class."""
    file = v4_checkpoints.FOLDER / name / "flax_model.msgpack"
    return shapes(flax.serialization.msgpack_restore(file.read_bytes()))


@pytest.mark.parametrize("name", v4_checkpoints.FLAX)
def test_tree_equals_that_of_transformers_4(name: str) -> None:
    model = getattr(monoblock, name).from_pretrained(v4_checkpoints.FOLDER / name)
    assert shapes(model.params) == shapes(model.params_shape_tree) == recorded(name)


def leaf(module: nn.Module, name: str, tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    """Flax's name of a module's parameter, and its shape in Flax."""
    shape = tuple(tensor.shape)
    if name == "bias":
        return name, shape
    if isinstance(module, nn.Embedding):
        return "embedding", shape
    if isinstance(module, transformers.pytorch_utils.Conv1D):
        return "kernel", shape
    if isinstance(module, nn.Linear):
        return "kernel", shape[::-1]
    # The RMS norm of transformers' Flax classes names its factors `weight`.
    return ("scale" if isinstance(module, nn.LayerNorm) else "weight"), shape


def expected(name: str) -> Shapes:
    """transformers' PyTorch modules with Flax's names; a tied tensor once, under its first name."""
    found: Shapes = {}
    model, seen = theirs_of(name), set[int]()
    for path, module in model.named_modules():
        for own, tensor in module.named_parameters(recurse=False):
            if id(tensor) not in seen:
                last, shape = leaf(module, own, tensor)
                found[*filter(None, path.split(".")), last] = shape
            seen.add(id(tensor))
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_tree_has_the_names_of_the_pytorch_modules(name: str) -> None:
    theirs = theirs_of(name)
    model = getattr(monoblock, "Flax" + name)(theirs.config, _do_init=False)
    assert shapes(model.params_shape_tree) == expected(name)


@pytest.mark.parametrize("name", v4_checkpoints.FLAX)
def test_trees_of_transformers_4_follow_the_naming_rule(name: str) -> None:
    """The rule for classes without a Flax version gives the trees of those that had one."""
    config = transformers.AutoConfig.from_pretrained(v4_checkpoints.FOLDER / name)
    model = getattr(transformers, name.removeprefix("Flax"))(config)
    names = {".".join(path[:-1]) for path in recorded(name)}
    assert names == {key.rpartition(".")[0] for key, _ in model.named_parameters()}
