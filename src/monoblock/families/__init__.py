"""The registry of model families. A family is a module of data, imported on first use."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from monoblock.checkpoint.keymap import KeyMap
from monoblock.config import PretrainedConfig
from monoblock.field_types import brief
from monoblock.modules import KerasNames, ModuleSpec, class_tree

log = logging.getLogger("monoblock")
_warned: set[str] = set()

# Kind of head -> its modules, by attribute name.
Heads = Mapping[str, Mapping[str, str | ModuleSpec]]


@dataclass(frozen=True)
class ModelClass:
    """A public model class: the kind of its head (None: bare model), the arguments of its forward in transformers'
    order, separated by spaces, and the class of its output."""

    name: str
    head: str | None
    forward: str
    output: str


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family as data: config class, module tree, key map and public classes.

    `prefix`: attribute name of the bare model inside a model with a head. `tree`: the bare model's module tree.
    `heads`: the modules of each kind of head. `extra`: keyword arguments of every forward in addition to its signature.
    `bare`: the class of the bare model if that is not public. `keras_names`: layer and variable names of the TF classes
    that differ from the tree.
    """

    config: type[PretrainedConfig]
    prefix: str
    keymap: Callable[[Any, str | None], KeyMap]
    tree: Callable[[Any], ModuleSpec]
    heads: Heads
    classes: tuple[ModelClass, ...]
    extra: tuple[str, ...] = ()
    bare: ModelClass | None = None
    keras_names: KerasNames = field(default_factory=KerasNames)

    @property
    def bare_class(self) -> ModelClass:
        """The class of the bare model inside a model with a head: `bare`, or the public one."""
        return self.bare or next(c for c in self.classes if c.head in (None, "pooler"))

    @functools.cached_property
    def projections(self) -> dict[str, str]:
        """Kind of head -> transformers' attribute name of its projection, if that is a direct attribute of the
        model."""
        heads = self.keymap(self.config(), None).heads
        names = {
            k: r.spellings[0].names[0]
            for k, rows in heads.items()
            for r in rows
            if r.canonical == "head.out.{p}"
        }
        return {kind: name.removesuffix(".{p}") for kind, name in names.items() if name.count(".") == 1}

    def layout(self, config: PretrainedConfig, row: ModelClass) -> ModuleSpec:
        """The module tree of a class, including its head's modules."""
        heads: Mapping[str, str | ModuleSpec] = {} if row.head is None else self.heads[row.head]
        return class_tree(row.name, self.tree(config), self.prefix, heads, row.head)

    @property
    def name(self) -> str:
        """The `model_type` in config.json."""
        return self.config.model_type

    def model_class(self, name: str) -> ModelClass:
        """The public class `name` (without a framework prefix)."""
        return next(c for c in self.classes if c.name == name)


# model_type -> the stem of the public class names, and their endings.
FAMILIES: dict[str, tuple[str, str]] = {
    "mpt": ("Mpt", "Model ForCausalLM ForSequenceClassification ForTokenClassification ForQuestionAnswering"),
    "mistral": (
        "Mistral",
        "Model ForCausalLM ForSequenceClassification ForTokenClassification ForQuestionAnswering",
    ),
    "fuyu": ("Fuyu", "ForCausalLM"),
    "openai-gpt": ("OpenAIGPT", "Model LMHeadModel DoubleHeadsModel ForSequenceClassification"),
    "gpt_neo": (
        "GPTNeo",
        "Model ForCausalLM ForSequenceClassification ForTokenClassification ForQuestionAnswering",
    ),
    "mpnet": (
        "MPNet",
        "Model ForMaskedLM ForSequenceClassification ForMultipleChoice ForTokenClassification ForQuestionAnswering",
    ),
}

# AutoModelFor... -> the endings of the classes that it selects from.
AUTO: dict[str, tuple[str, ...]] = {
    "AutoModel": ("Model",),
    "AutoModelForCausalLM": ("ForCausalLM", "LMHeadModel"),
    "AutoModelForMaskedLM": ("ForMaskedLM",),
    "AutoModelForMultipleChoice": ("ForMultipleChoice",),
    "AutoModelForSequenceClassification": ("ForSequenceClassification",),
    "AutoModelForTokenClassification": ("ForTokenClassification",),
    "AutoModelForQuestionAnswering": ("ForQuestionAnswering",),
    "AutoModelForImageTextToText": ("FuyuForCausalLM",),
}


def family(model_type: str) -> Family:
    """The family of a `model_type`, including further types that its config supports; ValueError lists the families if
    there is none."""
    if model_type in FAMILIES:
        return importlib.import_module(f"monoblock.families.{model_type.replace('-', '_')}").FAMILY
    for own in map(family, FAMILIES):
        if model_type in own.config.other_types:
            return own
    raise ValueError(f"monoblock has no family {brief(model_type)}; it has: {', '.join(sorted(FAMILIES))}")


def class_names(model_type: str) -> tuple[str, ...]:
    """The public model classes of a family, without a framework prefix."""
    stem, endings = FAMILIES[model_type]
    return tuple(stem + ending for ending in endings.split())


def named_classes(config: PretrainedConfig) -> tuple[ModelClass, ...]:
    """The public classes named in a config's `architectures`: case-insensitive (upstream writes MPTForCausalLM), and
    also with the stem of another model type of the family (MinistralForCausalLM)."""
    own = family(config.model_type)
    stem = FAMILIES[own.name][0].lower()
    stems = [stem, *own.config.other_types]
    wanted = {name.lower() for name in config.architectures or ()}
    return tuple(
        row
        for row in own.classes
        if any(row.name.lower().replace(stem, other, 1) in wanted for other in stems)
    )


def warn_of_another_class(config: PretrainedConfig, chosen: ModelClass) -> None:
    """Warn once per class that a checkpoint's config names and its family does not have: what that class computes in
    addition (bidirectional attention, another head) is not computed."""
    if not config.architectures or named_classes(config):
        return
    name = config.architectures[0]
    stripped = name.removeprefix("TF").removeprefix("Flax")
    if stripped in class_names(family(config.model_type).name) or name in _warned:
        return
    _warned.add(name)
    log.warning(
        "config.json names the class %s, which is none of monoblock's: the weights are loaded as %s, without anything "
        "else that %s computes",
        brief(name),
        chosen.name,
        brief(name),
    )


def family_of(class_name: str) -> Family | None:
    """The family of a public model class; None if there is none."""
    return next((family(name) for name in FAMILIES if class_name in class_names(name)), None)


def row_of(name: str) -> tuple[Family, ModelClass]:
    """The family and the ModelClass of a public or bare class; AttributeError if there is none."""
    found = family_of(name)
    if found is not None:
        return found, found.model_class(name)
    for model_type in FAMILIES:
        own = family(model_type)
        if own.bare is not None and own.bare.name == name:
            return own, own.bare
    raise AttributeError(f"monoblock has no class {name!r}")


def auto_class(auto: str, config: PretrainedConfig, prefix: str = "") -> str:
    """The class that an `AutoModel...` selects for a config; both names have the framework prefix."""
    kind = family(config.model_type).name
    if (name := auto_name(auto.removeprefix(prefix), kind)) is not None:
        return prefix + name
    known = ", ".join(prefix + name for name in class_names(kind))
    raise ValueError(f"{auto} has no class for {config.model_type!r}; that family has: {known}")


def auto_name(auto: str, model_type: str) -> str | None:
    """The class of a family that an `AutoModel...` selects, both without a framework prefix; None if it has none."""
    names, stem = class_names(model_type), FAMILIES[model_type][0]
    candidates = (name for ending in AUTO[auto] for name in (stem + ending, ending))
    return next((name for name in candidates if name in names), None)
