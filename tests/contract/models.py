"""Pairs of the same random model on PyTorch, which is the reference, and on another backend; inputs for both."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny_families
import torch
from helpers import randomised

import monoblock
from monoblock.families import FAMILIES, class_names, family_of

torch.set_num_threads(1)

CLASSES = tuple(name for model_type in FAMILIES for name in class_names(model_type))
HEADS = {name: 3 if "QuestionAnswering" in name or "Token" in name else 6 for name in CLASSES}
Pair = Callable[..., tuple[Any, Any]]


def fields(name: str, **more: Any) -> dict[str, Any]:
    """The fields of a tiny two-layer config of that class."""
    kind = tiny_families.MODEL_TYPES[name]
    return tiny_families.fields(kind, HEADS[name], **{**tiny_families.TWO_LAYERS[kind], **more})


def reference(name: str, **more: Any) -> Any:
    """A random PyTorch model of that class, in evaluation mode."""
    return randomised(getattr(monoblock, name)(family_of(name).config(**fields(name, **more)))).eval()


def converted(theirs: Any, prefix: str, folder: Path) -> Any:
    """A PyTorch model's files, loaded by the class with that prefix ("Flax", "TF")."""
    theirs.save_pretrained(folder)
    return getattr(monoblock, prefix + theirs.row.name).from_pretrained(folder)


class Contract:
    """Base of the contracts: a test class of a backend derives from one and sets `prefix`."""

    prefix: str
    # Keyword arguments of `generate` that compile the loop over tokens in the cheapest way.
    graph: ClassVar[dict[str, Any]] = {}

    @pytest.fixture(scope="class")
    @classmethod
    def pair(cls, tmp_path_factory: pytest.TempPathFactory) -> Pair:
        """pair(name, **fields): a PyTorch model and the backend's with its weights; without fields, made once."""

        def made(name: str, **more: Any) -> tuple[Any, Any]:
            theirs = reference(name, **more)
            return theirs, converted(theirs, cls.prefix, tmp_path_factory.mktemp(name))

        once = functools.cache(made)
        return lambda name, **more: made(name, **more) if more else once(name)


def inputs(name: str, padding: str = "none") -> dict[str, torch.Tensor]:
    """Ids and mask for a class, longer than the windows."""
    ids, mask = tiny_families.model_inputs(name, padding)
    return {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}


def labels(name: str, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Labels for the class's loss."""
    return tiny_families.labels_of(name, given["input_ids"], given.get("attention_mask"))


def ids_of(rows: int, tokens: int, seed: int = 1) -> np.ndarray[Any, Any]:
    """Random ids without special tokens, (rows, tokens)."""
    return np.random.default_rng(seed).integers(10, tiny_families.VOCAB, (rows, tokens))


def numpy(given: dict[str, Any]) -> dict[str, Any]:
    """The PyTorch tensors of a call, those in lists too, as NumPy arrays."""

    def as_array(value: Any) -> Any:
        if isinstance(value, list):
            return [as_array(item) for item in value]
        return value.numpy() if isinstance(value, torch.Tensor) else value

    return {name: as_array(value) for name, value in given.items()}


def image_inputs(counts: tuple[int, ...]) -> dict[str, Any]:
    """Left-padded prompts of a Fuyu whose rows begin with that many patches."""
    ids, mask, patches, indices = tiny_families.with_images(counts)
    given = {"input_ids": ids, "attention_mask": mask}
    return given | {"image_patches": patches, "image_patches_indices": indices}


def tokens(model: Any, given: dict[str, Any], **options: Any) -> list[list[int]]:
    """The ids that `generate` of any backend returns; `given` are PyTorch tensors."""
    if isinstance(model, torch.nn.Module):
        options = {k: x for k, x in options.items() if k not in ("disable_compile", "jit_compile")}
        return model.generate(**given, **options).tolist()
    found = model.generate(**numpy(given), **options)
    return np.asarray(getattr(found, "sequences", found)).tolist()
