"""The public TF classes, made from the families' tables."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import keras

from monoblock import families
from monoblock.backends.tf.pretrained import TFPreTrainedModel
from monoblock.families import Family, ModelClass
from monoblock.heads import KINDS

PREFIX = "TF"

# Arguments that every call takes by keyword beside those of its own signature.
EXTRA = (
    "position_ids",
    "past_key_values",
    "use_cache",
    "cache_position",
    "sequence_id",
    "num_items_in_batch",
)


@functools.cache
def make_class(name: str) -> type[TFPreTrainedModel]:
    """The public class of that name, from its family's table."""
    plain = name.removeprefix(PREFIX)
    family = families.family_of(plain) if name.startswith(PREFIX) else None
    if family is None:
        raise AttributeError(f"monoblock has no class {name!r}")
    row = family.model_class(plain)
    names = arguments(row)
    extra = extra_arguments(family, row)
    body: dict[str, Any] = {
        "family": family,
        "row": row,
        "arguments": names,
        "extra": extra,
        "config_class": family.config,
        "base_model_prefix": family.prefix,
        "__module__": "monoblock",
        "__doc__": _document(name, row, names, extra),
        "call": _call(row, names, extra),
        family.prefix: property(lambda self: self.backbone),
    }
    if projection := family.projections.get(row.head or ""):
        body[projection] = property(lambda self: self.head.out)
    made: Any = types.new_class(
        name, (TFPreTrainedModel,), exec_body=lambda namespace: namespace.update(body)
    )
    keras.saving.register_keras_serializable("monoblock")(made)
    return made


def arguments(row: ModelClass) -> tuple[str, ...]:
    """The arguments in the order of the old TF classes: labels after `return_dict` where the family's own signature
    ends with that, else in their places."""
    own = row.forward.split()
    if "return_dict" not in own:
        own = [name for name in own if name not in ("cache_position", "logits_to_keep")]
        return (*own, "return_dict")
    labels = KINDS[row.head].labels if row.head else ()
    rest = [name for name in own if name not in (*labels, "cache_position", "logits_to_keep")]
    return (*rest, *(name for name in own if name in labels))


def extra_arguments(family: Family, row: ModelClass) -> tuple[str, ...]:
    """The keywords that a class's call takes beyond its signature."""
    own = arguments(row)
    causal = ("logits_to_keep",) if row.head == "causal" else ()
    return tuple(name for name in (*EXTRA, *causal, *family.extra) if name not in own)


def _call(row: ModelClass, names: tuple[str, ...], extra: tuple[str, ...]) -> Callable[..., Any]:
    """The common call under the class's own signature, from which Keras reads what a model takes."""

    def call(self: TFPreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return self.run({**dict(zip(names, args, strict=False)), **kwargs})

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    every = [inspect.Parameter(name, kind, default=None) for name in (*names, "training", *extra)]
    call.__signature__ = inspect.Signature([inspect.Parameter("self", kind), *every])  # pyright: ignore
    call.__doc__ = f"Returns TF{row.output}, or its tuple with return_dict=False."
    return call


def _document(name: str, row: ModelClass, names: tuple[str, ...], extra: tuple[str, ...]) -> str:
    what = f"the model with a head of the kind {row.head!r}" if row.head else "the bare model"
    return (
        f"{name}: {what}, a `keras.Model`.\n\nArguments, in order: {', '.join(names)}, training; by keyword also "
        f"{', '.join(extra)}. All of them by keyword, or in the first argument: a tensor (input_ids), a list or tuple "
        "in that order, or a dict. Shapes: input_ids, attention_mask and token labels (batch, tokens); inputs_embeds "
        f"(batch, tokens, width). Returns `TF{row.output}`."
    )
