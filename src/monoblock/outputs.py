"""What models return: dataclasses that are also ordered mappings, as transformers' `ModelOutput`s are."""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, ItemsView, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, cast, overload


def _refused(what: str) -> Any:
    """A method that would put the items out of step with the fields."""

    def refuse(self: ModelOutput, *_: Any, **__: Any) -> NoReturn:
        """Refused: see the class's docstring."""
        raise TypeError(
            f"{what} is not for a {type(self).__name__}, whose items are its fields: set output.name = value (None "
            "takes it out), or work on dict(output)"
        )

    return refuse


class _Both:
    """The mark of a class that two libraries' classes make together, for `isinstance` alone."""


class ModelOutput(OrderedDict[str, Any]):
    """A dataclass whose fields that are not None are also the items of an ordered mapping, in the fields' order.

    They can be read by attribute, key, index and slice. The constructor takes the fields, or, as `dict` does, one
    mapping or iterable of (name, value) pairs in their place. Items can be set and not removed; a field that is set
    to None leaves the mapping.
    """

    # The classes that derive from this one, and what is called with each that comes: a framework registers them as
    # nodes of its trees.
    subclasses: ClassVar[list[type[ModelOutput]]] = []
    on_subclass: ClassVar[list[Callable[[type[ModelOutput]], None]]] = []
    __match_args__: tuple[str, ...] = ()  # the fields' names, which `dataclass` sets

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if issubclass(cls, _Both):
            return
        super().__init_subclass__(**kwargs)
        ModelOutput.subclasses.append(cls)
        for call in ModelOutput.on_subclass:
            call(cls)

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The class of this object; with transformers imported, one that derives from transformers' `ModelOutput` too:
        its pipelines ask for an instance of that."""
        own = type(self)
        theirs = getattr(sys.modules.get("transformers.utils.generic"), "ModelOutput", None)
        return own if theirs is None else _both(own, theirs)

    def __post_init__(self) -> None:
        names = self.__match_args__
        first = getattr(self, names[0])
        if first is None or len(self) > 1 or (pairs := _pairs(first, names)) is None:
            return
        self.__setattr__(names[0], None)
        for name, value in pairs.items():
            self.__setattr__(name, value)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None, in the order of the fields."""
        return tuple(self.values())

    @overload
    def __getitem__(self, key: str | int) -> Any: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Any, ...]: ...
    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.__setattr__(key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if value is None:
            if name in self:
                super().__delitem__(name)
            return
        new = name not in self
        super().__setitem__(name, value)
        names = self.__match_args__
        if new and name in names:
            for later in names[names.index(name) + 1 :]:
                if later in self:
                    self.move_to_end(later)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name in self:
            super().__delitem__(name)

    __delitem__ = _refused("del output[name]")
    clear = _refused("clear")
    pop = _refused("pop")
    popitem = _refused("popitem")
    setdefault = _refused("setdefault")
    update = _refused("update")


@functools.cache
def _both(own: type, theirs: type) -> type:
    """A class that derives from both; calling it makes an object of `own`."""

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        del cls
        return own(*args, **kwargs)

    body = {"__new__": new, "__module__": own.__module__, "__qualname__": own.__qualname__}
    return type(own.__name__, (own, theirs, _Both), body)


def _pairs(value: Any, names: tuple[str, ...]) -> dict[str, Any] | None:
    """A mapping, or an iterable of pairs, whose keys are all fields, as a dict; None for any other value."""
    if isinstance(value, Mapping | ItemsView | Iterator) or (isinstance(value, list | tuple) and value):
        try:
            found = dict(cast(Any, value))
        except (TypeError, ValueError):
            return None
        return found if all(name in names for name in found) else None
    return None


@dataclass
class BaseModelOutputWithPast(ModelOutput):
    """Shapes: last_hidden_state (batch, tokens, width); hidden_states layers + 1 of it; attentions, one for
    each layer, (batch, heads, tokens, keys)."""

    last_hidden_state: Any = None
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@dataclass
class BaseModelOutputWithPastAndCrossAttentions(BaseModelOutputWithPast):
    """The same; `cross_attentions` is always None, as no family here has any."""

    cross_attentions: tuple[Any, ...] | None = None


@dataclass
class CausalLMOutputWithPast(ModelOutput):
    """Shapes: loss (); logits (batch, tokens, vocab)."""

    loss: Any = None
    logits: Any = None
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@dataclass
class CausalLMOutputWithCrossAttentions(CausalLMOutputWithPast):
    """The same; `cross_attentions` is always None, as no family here has any."""

    cross_attentions: tuple[Any, ...] | None = None


@dataclass
class SequenceClassifierOutputWithPast(ModelOutput):
    """Shapes: loss (); logits (batch, labels)."""

    loss: Any = None
    logits: Any = None
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@dataclass
class _Logits(ModelOutput):
    loss: Any = None
    logits: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@dataclass
class TokenClassifierOutput(_Logits):
    """Shapes: loss (); logits (batch, tokens, labels)."""


@dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """Shapes: loss (); start_logits and end_logits (batch, tokens)."""

    loss: Any = None
    start_logits: Any = None
    end_logits: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@dataclass
class BaseModelOutput(ModelOutput):
    """Shapes: last_hidden_state (batch, tokens, width); hidden_states layers + 1 of it. The hub's class of this name
    has no cache; here one comes last if it was asked for."""

    last_hidden_state: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    past_key_values: Any = None


@dataclass
class BaseModelOutputWithPooling(ModelOutput):
    """Shapes: last_hidden_state (batch, tokens, width); pooler_output (batch, width)."""

    last_hidden_state: Any = None
    pooler_output: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@dataclass
class CausalLMOutput(_Logits):
    """Shapes: loss (); logits (batch, tokens, vocab). The hub's class of this name has no cache; here one comes last
    if it was asked for."""

    past_key_values: Any = None


@dataclass
class MaskedLMOutput(_Logits):
    """Shapes: loss (); logits (batch, tokens, vocab)."""


@dataclass
class SequenceClassifierOutput(_Logits):
    """Shapes: loss (); logits (batch, labels)."""


@dataclass
class MultipleChoiceModelOutput(_Logits):
    """Shapes: loss (); logits (batch, choices)."""


@dataclass
class OpenAIGPTDoubleHeadsModelOutput(ModelOutput):
    """Shapes: loss and mc_loss (); logits (batch, choices, tokens, vocab); mc_logits (batch, choices)."""

    loss: Any = None
    mc_loss: Any = None
    logits: Any = None
    mc_logits: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None
