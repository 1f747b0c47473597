"""The public TF classes, made from the families' tables."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras

from monoblock.backends import classes
from monoblock.backends.tf.pretrained import TFPreTrainedModel
from monoblock.families import Family, ModelClass
from monoblock.heads import KINDS

PREFIX = "TF"


@functools.cache
def make_class(name: str) -> type[TFPreTrainedModel]:
    """The public class of that name, from its family's table."""
    family, row = classes.row_of(name, PREFIX)
    names, extra = arguments(row), extra_arguments(family, row)
    own: dict[str, Any] = {
        "row": row,
        "arguments": names,
        "extra": extra,
        "__doc__": _document(name, row, names, extra),
        "call": _call(row, names, extra),
        family.prefix: property(lambda self: self.backbone),
    }
    if projection := family.projections.get(row.head or ""):
        own[projection] = property(lambda self: self.head.out)
    made = classes.new_class(name, (TFPreTrainedModel,), family, own)
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
    return classes.extra_arguments(family, row, arguments(row))


def _call(row: ModelClass, names: tuple[str, ...], extra: tuple[str, ...]) -> Callable[..., Any]:
    """The common call under the class's own signature, from which Keras reads what a model takes."""

    def call(self: TFPreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return self.run({**dict(zip(names, args, strict=False)), **kwargs})

    every = classes.parameters((*names, "training", *extra), keep=None)
    return classes.signed(call, [classes.SELF, *every], f"TF{row.output}")


def _document(name: str, row: ModelClass, names: tuple[str, ...], extra: tuple[str, ...]) -> str:
    return (
        f"{classes.summary(name, row)}, a `keras.Model`.\n\nArguments, in order: {', '.join(names)}, training; by "
        f"keyword also {', '.join(extra)}. All of them by keyword, or in the first argument: a tensor (input_ids), a "
        f"list or tuple in that order, or a dict. {classes.SHAPES} Returns `TF{row.output}`."
    )
