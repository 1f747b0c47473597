"""The public TF classes, made from the families' tables."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import keras

from monoblock import families
from monoblock.backends.tf.main_layer import MainLayer
from monoblock.backends.tf.parts import PREFIX
from monoblock.backends.tf.pretrained import TFPreTrainedModel
from monoblock.families import Family, ModelClass
from monoblock.heads import KINDS

BASE, MAIN = "PreTrainedModel", "MainLayer"  # what the names of bases and of main layers end with

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
def make_class(name: str) -> type[Any]:
    """The class of that name, from its family's table: a model, `TF<stem>PreTrainedModel` or `TF<stem>MainLayer`."""
    plain = name.removeprefix(PREFIX)
    if name == plain:
        raise AttributeError(f"monoblock has no class {name!r}")
    for ending, make in ((BASE, make_base_class), (MAIN, make_main_class)):
        if plain.endswith(ending):
            return make(plain.removesuffix(ending))
    family = families.family_of(plain)
    if family is None:
        raise AttributeError(f"monoblock has no class {name!r}")
    row = family.model_class(plain)
    names, extra = arguments(row), extra_arguments(family, row)
    what = f"the model with a head of the kind {row.head!r}" if row.head else "the bare model"
    body: dict[str, Any] = {
        "row": row,
        "arguments": names,
        "extra": extra,
        "__doc__": _document(f"{name}: {what}, a `keras.Model`.", row, names, extra),
        "call": _call(row, names, extra),
    }
    return _registered(name, make_base_class(families.FAMILIES[family.name][0]), body)


@functools.cache
def make_base_class(stem: str) -> type[TFPreTrainedModel]:
    """The base of a family's models, which holds what they have in common."""
    family = _family(stem, BASE)
    body: dict[str, Any] = {
        "family": family,
        "config_class": family.config,
        "base_model_prefix": family.prefix,
        "main_class": make_main_class(stem),
        "__module__": "monoblock",
        "__doc__": f"The base of the classes {_models(family)}; no model by itself.",
        "__new__": _refuse_base,
    }
    bases = (TFPreTrainedModel,)
    return types.new_class(PREFIX + stem + BASE, bases, exec_body=lambda namespace: namespace.update(body))


@functools.cache
def make_main_class(stem: str) -> type[MainLayer]:
    """The layer that every model of a family holds under the family's prefix: the bare model."""
    family = _family(stem, MAIN)
    row, name = family.bare_class, PREFIX + stem + MAIN
    names, extra = arguments(row), extra_arguments(family, row)
    what = f"{name}: the bare model as a layer, which {_models(family)} hold as `{family.prefix}`."
    body: dict[str, Any] = {
        "family": family,
        "row": row,
        "arguments": names,
        "extra": extra,
        "config_class": family.config,
        "__doc__": _document(what, row, names, extra),
        "call": _call(row, names, extra),
    }
    return _registered(name, MainLayer, body)


def _registered(name: str, base: type[Any], body: dict[str, Any]) -> Any:
    """A class that Keras finds by its name when it reads a file: in the `.keras` format, and in `.h5`."""
    body = {**body, "__module__": "monoblock"}
    made: Any = types.new_class(name, (base,), exec_body=lambda namespace: namespace.update(body))
    keras.saving.register_keras_serializable("monoblock")(made)
    keras.saving.get_custom_objects()[name] = made
    return made


def _family(stem: str, ending: str) -> Family:
    kind = next((kind for kind, (own, _) in families.FAMILIES.items() if own == stem), None)
    if kind is None:
        raise AttributeError(f"monoblock has no class {PREFIX + stem + ending!r}")
    return families.family(kind)


def _models(family: Family) -> str:
    return ", ".join(PREFIX + row.name for row in family.classes)


def _refuse_base(cls: Any, *args: Any, **kwargs: Any) -> Any:
    if not hasattr(cls, "row"):
        raise TypeError(f"{cls.__name__} is only the base of {_models(cls.family)}: make one of these")
    return TFPreTrainedModel.__new__(cls, *args, **kwargs)


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

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.run({**dict(zip(names, args, strict=False)), **kwargs})

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    every = [inspect.Parameter(name, kind, default=None) for name in (*names, "training", *extra)]
    call.__signature__ = inspect.Signature([inspect.Parameter("self", kind), *every])  # pyright: ignore
    call.__doc__ = f"Returns TF{row.output}, or its tuple with return_dict=False."
    return call


def _document(what: str, row: ModelClass, names: tuple[str, ...], extra: tuple[str, ...]) -> str:
    return (
        f"{what}\n\nArguments, in order: {', '.join(names)}, training; by keyword also "
        f"{', '.join(extra)}. All of them by keyword, or in the first argument: a tensor (input_ids), a list or tuple "
        "in that order, or a dict. Shapes: input_ids, attention_mask and token labels (batch, tokens); inputs_embeds "
        f"(batch, tokens, width). Returns `TF{row.output}`."
    )
