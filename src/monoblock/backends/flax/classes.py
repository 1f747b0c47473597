"""Creation of the public Flax classes from the families' tables."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from monoblock import families
from monoblock.backends import classes
from monoblock.backends.flax.outputs import output_class
from monoblock.backends.flax.pretrained import FlaxPreTrainedModel
from monoblock.families import Family, ModelClass

PREFIX = "Flax"

# Keyword-only inputs of a call, if the class has them.
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
    """The base class of a family's models: `Flax<stem>PreTrainedModel`."""
    return classes.new_base(name, PREFIX, (FlaxPreTrainedModel,))


@functools.cache
def make_class(name: str) -> type[FlaxPreTrainedModel]:
    """The public class with a name, created from its family's table."""
    family, row = classes.row_of(name, PREFIX)
    inputs = extra_arguments(family, row)
    base = make_base_class(PREFIX + families.FAMILIES[family.name][0] + classes.BASE)
    own = {
        "row": row,
        "inputs": inputs,
        "__doc__": _document(name, row, inputs),
        "__call__": _call(row, inputs),
    }
    return classes.new_class(name, (base,), family, own)


def extra_arguments(family: Family, row: ModelClass) -> tuple[str, ...]:
    """The keyword-only inputs of a class's call, in addition to the common signature."""
    own = {*row.forward.split(), *family.extra}
    causal = ("logits_to_keep",) if row.head == "causal" else ()
    return (*(name for name in INPUTS if name in own), "sequence_id", *causal)


def _call(row: ModelClass, inputs: tuple[str, ...]) -> Callable[..., Any]:
    """The common `__call__` with a signature that includes the class's inputs."""

    def call(self: FlaxPreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return FlaxPreTrainedModel.__call__(self, *args, **kwargs)

    *common, _ = inspect.signature(FlaxPreTrainedModel.__call__).parameters.values()
    own = classes.parameters(inputs, inspect.Parameter.KEYWORD_ONLY)
    call.__name__ = "__call__"
    return classes.signed(call, [*common, *own], output_class(row.output).__name__)


def _document(name: str, row: ModelClass, inputs: tuple[str, ...]) -> str:
    return (
        f"{classes.summary(name, row)}.\n\nInputs are NumPy or JAX arrays, or nested lists: input_ids, attention_mask, "
        f"position_ids (batch, tokens), and by keyword {', '.join(inputs)}. `params` replaces the model's parameters; "
        "`init_cache` makes a cache; `train=True` needs `dropout_rng`. Works under jit, grad and vmap. Returns "
        f"`{output_class(row.output).__name__}`."
    )
