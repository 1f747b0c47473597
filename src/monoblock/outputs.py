"""Model outputs: dataclasses that are also ordered mappings, like transformers' `ModelOutput`."""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, ItemsView, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, cast, overload


def _refused(what: str) -> Any:
    """A mapping method that would make items inconsistent with fields, replaced by an error."""

    def refuse(self: ModelOutput, *_: Any, **__: Any) -> NoReturn:
        """Not supported; see the docstring of the class."""
        raise TypeError(
            f"{what} is not supported: the items of a {type(self).__name__} are its fields; set output.name = value "
            "(None removes the item), or use dict(output)"
        )

    return refuse


class _Combined:
    """Marks classes derived from two libraries' classes, which exist only for `isinstance`."""


class ModelOutput(OrderedDict[str, Any]):
    """A dataclass whose fields that are not None are also the items of an ordered mapping, in the fields' order.

    They can be read by attribute, key, index and slice. The constructor takes the fields or, like `dict`, one mapping
    or iterable of (name, value) pairs. Items can be set but not removed; setting a field to None removes its item.
    """

    # Subclasses, and callbacks for new ones, by which frameworks register them as pytree nodes.
    subclasses: ClassVar[list[type[ModelOutput]]] = []
    on_subclass: ClassVar[list[Callable[[type[ModelOutput]], None]]] = []
    __match_args__: tuple[str, ...] = ()  # field names, set by `dataclass`

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if issubclass(cls, _Combined):
            return
        super().__init_subclass__(**kwargs)
        ModelOutput.subclasses.append(cls)
        for call in ModelOutput.on_subclass:
            call(cls)

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The class of this object; if transformers is imported, one that also derives from its `ModelOutput`, which
        transformers' pipelines check for."""
        own = type(self)
        theirs = getattr(sys.modules.get("transformers.utils.generic"), "ModelOutput", None)
        return own if theirs is None else _combined(own, theirs)

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
def _combined(own: type, theirs: type) -> type:
    """A class that derives from both; calling it creates an `own`."""

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        del cls
        return own(*args, **kwargs)

    body = {"__new__": new, "__module__": own.__module__, "__qualname__": own.__qualname__}
    return type(own.__name__, (own, theirs, _Combined), body)


def _pairs(value: Any, names: tuple[str, ...]) -> dict[str, Any] | None:
    """A mapping or iterable of pairs as a dict, if all keys are field names; None for any other value."""
    if isinstance(value, Mapping | ItemsView | Iterator) or (isinstance(value, list | tuple) and value):
        try:
            found = dict(cast(Any, value))
        except (TypeError, ValueError):
            return None
        return found if all(name in names for name in found) else None
    return None


@dataclass
class BaseModelOutputWithPast(ModelOutput):
    """Shapes: last_hidden_state (batch, tokens, width); hidden_states: layers + 1 arrays of that shape; attentions: one
    array (batch, heads, tokens, keys) per layer."""

    last_hidden_state: Any = None
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@dataclass
class BaseModelOutputWithPastAndCrossAttentions(BaseModelOutputWithPast):
    """With `cross_attentions`, which is always None: no family here has cross-attention."""

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
    """With `cross_attentions`, which is always None: no family here has cross-attention."""

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
    """Shapes: last_hidden_state (batch, tokens, width); hidden_states: layers + 1 arrays of that shape. Unlike
    transformers' class, it returns a requested cache, as the last item."""

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
    """Shapes: loss (); logits (batch, tokens, vocab). Unlike transformers' class, it returns a requested cache, as the
    last item."""

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
