"""The public Flax classes, made from the families' tables."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from monoblock import families
from monoblock.backends.flax.outputs import output_class
from monoblock.backends.flax.pretrained import FlaxPreTrainedModel
from monoblock.families import Family, ModelClass

PREFIX = "Flax"
BASE = "PreTrainedModel"  # what the name of a family's base class ends with

# Inputs that a call takes by keyword, where the class has them.
INPUTS = (
    "inputs_embeds",
    "token_type_ids",
    "mc_token_ids",
    "image_patches",
    "image_patches_indices",
    "pixel_values",
)


@functools.cache
def make_base_class(name: str) -> type[FlaxPreTrainedModel]:
    """The base of a family's classes, which holds what they have in common: `Flax<stem>PreTrainedModel`."""
    stem = name.removeprefix(PREFIX).removesuffix(BASE)
    kind = next((kind for kind, (own, _) in families.FAMILIES.items() if own == stem), None)
    if kind is None:
        raise AttributeError(f"monoblock has no class {name!r}")
    family = families.family(kind)
    names = ", ".join(PREFIX + row.name for row in family.classes)
    body: dict[str, Any] = {
        "family": family,
        "config_class": family.config,
        "base_model_prefix": family.prefix,
        "__module__": "monoblock",
        "__doc__": f"The base of the classes {names}; no model by itself.",
        "__new__": _refuse_base,
    }
    return types.new_class(name, (FlaxPreTrainedModel,), exec_body=lambda namespace: namespace.update(body))


def _refuse_base(cls: type[FlaxPreTrainedModel], *_: Any, **__: Any) -> FlaxPreTrainedModel:
    if not hasattr(cls, "row"):
        known = ", ".join(PREFIX + row.name for row in cls.family.classes)
        raise TypeError(f"{cls.__name__} is only the base of {known}: make one of these")
    return object.__new__(cls)


@functools.cache
def make_class(name: str) -> type[FlaxPreTrainedModel]:
    """The public class of that name, from its family's table."""
    family = families.family_of(name.removeprefix(PREFIX))
    if family is None or not name.startswith(PREFIX):
        raise AttributeError(f"monoblock has no class {name!r}")
    row = family.model_class(name.removeprefix(PREFIX))
    inputs = extra_arguments(family, row)
    base = make_base_class(PREFIX + families.FAMILIES[family.name][0] + BASE)
    body: dict[str, Any] = {
        "row": row,
        "inputs": inputs,
        "__module__": "monoblock",
        "__doc__": _document(name, row, inputs),
        "__call__": _call(row, inputs),
    }
    return types.new_class(name, (base,), exec_body=lambda namespace: namespace.update(body))


def extra_arguments(family: Family, row: ModelClass) -> tuple[str, ...]:
    """The inputs that a class's call takes by keyword, beyond the signature that all share."""
    own = {*row.forward.split(), *family.extra}
    causal = ("logits_to_keep",) if row.head == "causal" else ()
    return (*(name for name in INPUTS if name in own), "sequence_id", *causal)


def _call(row: ModelClass, inputs: tuple[str, ...]) -> Callable[..., Any]:
    """The common call under a signature with the class's own inputs."""

    def call(self: FlaxPreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return FlaxPreTrainedModel.__call__(self, *args, **kwargs)

    keyword = inspect.Parameter.KEYWORD_ONLY
    *common, _ = inspect.signature(FlaxPreTrainedModel.__call__).parameters.values()
    own = [inspect.Parameter(n, keyword, default=0 if n == "logits_to_keep" else None) for n in inputs]
    call.__signature__ = inspect.Signature([*common, *own])  # pyright: ignore
    call.__name__ = "__call__"
    call.__doc__ = f"Returns {output_class(row.output).__name__}, or its tuple with return_dict=False."
    return call


def _document(name: str, row: ModelClass, inputs: tuple[str, ...]) -> str:
    what = f"the model with a head of the kind {row.head!r}" if row.head else "the bare model"
    return (
        f"{name}: {what}.\n\nInputs are NumPy or JAX arrays, or nested lists: input_ids, attention_mask, position_ids "
        f"(batch, tokens), and by keyword {', '.join(inputs)}. `params` stands in for the model's own; a cache comes "
        "from `init_cache`; `train=True` takes `dropout_rng`. Works under jit, grad and vmap. Returns "
        f"`{output_class(row.output).__name__}`."
    )
