"""What models return: dataclasses that are also dict-like and tuple-like, as the hub's `ModelOutput`s are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any


class ModelOutput:
    """A dataclass whose fields that are not None can also be read by key, by index, and by unpacking."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None, in the order of the fields."""
        return tuple(self.values())

    def items(self) -> Iterator[tuple[str, Any]]:
        """Pairs of name and value, without the None ones."""
        for field in fields(self):  # pyright: ignore[reportArgumentType]
            if (value := getattr(self, field.name)) is not None:
                yield field.name, value

    def keys(self) -> list[str]:
        """The names of the fields that are not None."""
        return [name for name, _ in self.items()]

    def values(self) -> list[Any]:
        """The values that are not None."""
        return [value for _, value in self.items()]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of that field, or the default if it is None or not there."""
        value = getattr(self, key, None)
        return default if value is None else value

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if (value := getattr(self, key, None)) is None:
                raise KeyError(key)
            return value
        return self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()


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
