"""The public PyTorch classes, made from the families' tables."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from monoblock import families
from monoblock.backends import classes
from monoblock.backends.classes import BASE
from monoblock.backends.pytorch import pytree
from monoblock.backends.pytorch.construction import Construction
from monoblock.backends.pytorch.pretrained import PreTrainedModel
from monoblock.families import Family, ModelClass
from monoblock.heads import KINDS
from monoblock.modules import ModuleSpec, submodules

pytree.register_outputs()


@functools.cache
def make_base_class(name: str) -> type[PreTrainedModel]:
    """The base of a family's classes, with their common attributes: `<stem>PreTrainedModel`."""
    return classes.new_base(name, "", (PreTrainedModel, Construction))


@functools.cache
def make_class(name: str) -> type[PreTrainedModel]:
    """The class of that name, from its family's table: a public one, a family's base, or the bare one inside a
    model with a head."""
    if name.endswith(BASE):
        return make_base_class(name)
    family, row = families.row_of(name)
    headed = row.head not in (None, "pooler")
    extra = extra_arguments(family, row)
    layer = next(part.name for part in submodules(family.tree(family.config())) if part.kind == "layer")
    base = make_base_class(families.FAMILIES[family.name][0] + BASE)
    own: dict[str, Any] = {
        "row": row,
        "make": staticmethod(make_class),
        "blank": staticmethod(blank),
        "extra": extra,
        "_no_split_modules": [layer],
        "_tied_weights_keys": _tied(family, row),
        "__signature__": _signature(row),
        "__doc__": _document(row, extra),
        "forward": _forward(row, headed),
    }
    return classes.new_class(name, (base,), family, own)


def blank(name: str) -> PreTrainedModel:
    """A model of the class of that name without anything in it, for pickle."""
    made = make_class(name)
    return made.__new__(made)


def _signature(row: ModelClass) -> inspect.Signature:
    """The constructor's signature, without arguments that the class does not use."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [inspect.Parameter("config", kind)]
    if row.head == "pooler":
        names.append(inspect.Parameter("add_pooling_layer", kind, default=True))
    return inspect.Signature(names)


def _tied(family: Family, row: ModelClass) -> dict[str, str] | None:
    """transformers' declaration: second name -> the parameter that it shares, if the config ties them."""
    if row.head is None or KINDS[row.head].size != "vocab":
        return None
    paths = {role: ".".join(path) for role, path in family.tree(family.config()).paths()}
    heads = dict(ModuleSpec("", "", family.heads[row.head]).paths())
    out = ".".join(heads["head_out"])
    tied = {f"{out}.weight": f"{family.prefix}.{paths['embed']}.weight"}
    if "lm_head" in heads:
        tied[f"{out}.bias"] = f"{out.rpartition('.')[0]}.bias"
    return tied


def extra_arguments(family: Family, row: ModelClass) -> tuple[str, ...]:
    """The keywords that a class's forward takes beyond its signature."""
    return classes.extra_arguments(family, row, row.forward.split())


def _forward(row: ModelClass, headed: bool) -> Callable[..., Any]:
    """The common forward under the class's own signature."""
    common = PreTrainedModel.forward_headed if headed else PreTrainedModel.forward_bare
    # A copy of the function, to avoid an additional stack frame.
    forward = types.FunctionType(
        common.__code__, common.__globals__, "forward", common.__defaults__, common.__closure__
    )
    forward.__kwdefaults__ = common.__kwdefaults__

    names = [classes.SELF, *classes.parameters(row.forward.split())]
    extra = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    return classes.signed(forward, [*names, extra], row.output)


def _document(row: ModelClass, extra: tuple[str, ...]) -> str:
    return (
        f"{classes.summary(row.name, row)}.\n\nArguments, in order: {', '.join(row.forward.split())}; by keyword also "
        f"{', '.join(extra)}. {classes.SHAPES} Returns `{row.output}`."
    )
