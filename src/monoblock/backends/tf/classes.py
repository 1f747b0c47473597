"""Creation of the public TF classes from the families' tables."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras

from monoblock import families
from monoblock.backends import classes
from monoblock.backends.classes import BASE
from monoblock.backends.tf.main_layer import MainLayer
from monoblock.backends.tf.parts import PREFIX
from monoblock.backends.tf.pretrained import TFPreTrainedModel
from monoblock.families import Family, ModelClass
from monoblock.heads import KINDS

MAIN = "MainLayer"  # suffix of the names of main layer classes


@functools.cache
def make_class(name: str) -> type[Any]:
    """The class with a name, from its family's table: a model, `TF<stem>PreTrainedModel` or `TF<stem>MainLayer`."""
    if name.endswith((BASE, MAIN)):
        return make_base_class(name)
    family, row = classes.row_of(name, PREFIX)
    names, extra = arguments(row), extra_arguments(family, row)
    own: dict[str, Any] = {
        "row": row,
        "arguments": names,
        "extra": extra,
        "__doc__": _document(f"{classes.summary(name, row)}, a `keras.Model`.", row, names, extra),
        "call": _call(row, names, extra),
    }
    base = make_base_class(PREFIX + families.FAMILIES[family.name][0] + BASE)
    return _registered(classes.new_class(name, (base,), family, own))


@functools.cache
def make_base_class(name: str) -> type[Any]:
    """The base class of a family's models, or the class of their main layers."""
    ending = MAIN if name.endswith(MAIN) else BASE
    stem = name.removeprefix(PREFIX).removesuffix(ending)
    kind = next((kind for kind, (own, _) in families.FAMILIES.items() if own == stem), None)
    if kind is None or name != PREFIX + stem + ending:
        raise AttributeError(f"monoblock has no class {name!r}")
    family = families.family(kind)
    models = ", ".join(PREFIX + row.name for row in family.classes)
    if ending == MAIN:
        return _main_class(name, family, models)

    def refuse(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(cls, "row"):
            raise TypeError(f"{cls.__name__} is only the base of {models}: make one of these")
        return TFPreTrainedModel.__new__(cls, *args, **kwargs)

    own = {
        "__doc__": f"The base class of {models}; not a model itself.",
        "__new__": refuse,
        "main_class": make_base_class(PREFIX + stem + MAIN),
    }
    return classes.new_class(name, (TFPreTrainedModel,), family, own)


def _main_class(name: str, family: Family, models: str) -> type[MainLayer]:
    row = family.bare_class
    names, extra = arguments(row), extra_arguments(family, row)
    what = f"{name}: the bare model as a layer, the `{family.prefix}` of {models}."
    own: dict[str, Any] = {
        "row": row,
        "arguments": names,
        "extra": extra,
        "__doc__": _document(what, row, names, extra),
        "call": _call(row, names, extra),
    }
    return _registered(classes.new_class(name, (MainLayer,), family, own))


def _registered(made: Any) -> Any:
    """Register a class, so that Keras finds it by name when it loads `.keras` and `.h5` files."""
    keras.saving.register_keras_serializable("monoblock")(made)
    keras.saving.get_custom_objects()[made.__name__] = made
    return made


def arguments(row: ModelClass) -> tuple[str, ...]:
    """The arguments in the order of transformers' TF classes: labels after `return_dict` if the family's signature has
    it, else in the order of the signature."""
    own = row.forward.split()
    if "return_dict" not in own:
        own = [name for name in own if name not in ("cache_position", "logits_to_keep")]
        return (*own, "return_dict")
    labels = KINDS[row.head].labels if row.head else ()
    rest = [name for name in own if name not in (*labels, "cache_position", "logits_to_keep")]
    return (*rest, *(name for name in own if name in labels))


def extra_arguments(family: Family, row: ModelClass) -> tuple[str, ...]:
    """The keyword-only arguments of a class's call, in addition to its signature."""
    return classes.extra_arguments(family, row, arguments(row))


def _call(row: ModelClass, names: tuple[str, ...], extra: tuple[str, ...]) -> Callable[..., Any]:
    """The common call with the class's signature, which Keras inspects."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.run({**dict(zip(names, args, strict=False)), **kwargs})

    every = classes.parameters((*names, "training", *extra), keep=None)
    return classes.signed(call, [classes.SELF, *every], f"TF{row.output}")


def _document(what: str, row: ModelClass, names: tuple[str, ...], extra: tuple[str, ...]) -> str:
    return (
        f"{what}\n\nArguments, in order: {', '.join(names)}, training; by keyword also {', '.join(extra)}. All of them "
        f"by keyword, or in the first argument: a tensor (input_ids), a list or tuple in that order, or a dict. "
        f"{classes.SHAPES} Returns `TF{row.output}`."
    )
