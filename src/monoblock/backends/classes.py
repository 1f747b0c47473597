"""What the factories of public classes share: from a row of a family's table to a class, whatever its framework."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from monoblock import families
from monoblock.families import Family, ModelClass

BASE = "PreTrainedModel"  # what the name of a family's base class ends with
# Arguments that every call of a PyTorch or TF class takes by keyword beside those of its own signature.
COMMON = (
    "position_ids",
    "past_key_values",
    "use_cache",
    "return_dict",
    "cache_position",
    "sequence_id",
    "num_items_in_batch",
)


def row_of(name: str, prefix: str) -> tuple[Family, ModelClass]:
    """The family and the row of a public class, whose name has the framework's prefix; AttributeError if there is
    none."""
    plain = name.removeprefix(prefix)
    family = families.family_of(plain) if name.startswith(prefix) else None
    if family is None:
        raise AttributeError(f"monoblock has no class {name!r}")
    return family, family.model_class(plain)


def new_class(name: str, bases: tuple[type, ...], family: Family, own: Mapping[str, Any]) -> Any:
    """A public class of that family, with attributes of its own."""
    body = {
        "family": family,
        "config_class": family.config,
        "base_model_prefix": family.prefix,
        "__module__": "monoblock",
        **own,
    }
    return types.new_class(name, bases, exec_body=lambda namespace: namespace.update(body))


def new_base(name: str, prefix: str, bases: tuple[type, ...]) -> Any:
    """The base of a family's classes, which holds what they have in common: `<prefix><stem>PreTrainedModel`. It refuses
    to be made by itself. AttributeError if there is no such family."""
    stem = name.removeprefix(prefix).removesuffix(BASE)
    kind = next((kind for kind, (own, _) in families.FAMILIES.items() if own == stem), None)
    if kind is None:
        raise AttributeError(f"monoblock has no class {name!r}")
    names = ", ".join(prefix + own for own in families.class_names(kind))

    def refuse(cls: type, *_: Any, **__: Any) -> Any:
        if not hasattr(cls, "row"):
            raise TypeError(f"{cls.__name__} is only the base of {names}: make one of these")
        return object.__new__(cls)

    own = {"__doc__": f"The base of the classes {names}; no model by itself.", "__new__": refuse}
    return new_class(name, bases, families.family(kind), own)


def extra_arguments(
    family: Family, row: ModelClass, own: Iterable[str], common: Iterable[str] = COMMON
) -> tuple[str, ...]:
    """The keywords that a class's call takes beyond those of its `own` signature; `common`: those of all classes."""
    causal = ("logits_to_keep",) if row.head == "causal" else ()
    named = set(own)
    return tuple(name for name in (*common, *causal, *family.extra) if name not in named)


def signed(
    call: Callable[..., Any], parameters: Iterable[inspect.Parameter], output: str
) -> Callable[..., Any]:
    """The call under that signature, by which tools see what a class takes."""
    call.__signature__ = inspect.Signature(list(parameters))  # pyright: ignore[reportFunctionMemberAccess]
    call.__doc__ = f"Returns {output}, or its tuple with return_dict=False."
    return call


def parameters(
    names: Iterable[str], kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD, keep: int | None = 0
) -> list[inspect.Parameter]:
    """Optional arguments; `keep`: the default of logits_to_keep."""
    return [
        inspect.Parameter(name, kind, default=keep if name == "logits_to_keep" else None) for name in names
    ]


SELF = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
SHAPES = "Shapes: input_ids, attention_mask and token labels (batch, tokens); inputs_embeds (batch, tokens, width)."


def summary(name: str, row: ModelClass) -> str:
    """What a class is, in a line."""
    return f"{name}: " + (f"the model with a head of the kind {row.head!r}" if row.head else "the bare model")
