"""Output classes of Flax models: transformers' output classes, registered as pytrees.

`past_key_values` is set if a cache was given; fields that are None are left out of the tuple. Losses are separate:
`model.compute_loss(outputs, labels=...)`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeVar, dataclass_transform

import jax

from monoblock.outputs import ModelOutput

T = TypeVar("T", bound=type)


@dataclass_transform()
def pytree(cls: T) -> T:
    """Make a class a dataclass and a pytree of its fields."""
    made = dataclass(cls)
    names = [field.name for field in fields(made)]
    return jax.tree_util.register_dataclass(made, data_fields=names, meta_fields=[])


class FlaxModelOutput(ModelOutput):
    """The base class of all outputs."""

    def replace(self, **changes: Any) -> Self:
        """A copy with these fields changed."""
        return replace(self, **changes)  # pyright: ignore[reportArgumentType, reportUnknownVariableType]


@pytree
class FlaxBaseModelOutput(FlaxModelOutput):
    """Shapes: last_hidden_state (batch, tokens, width); hidden_states, layers + 1 of the same shape;
    attentions, one per layer, (batch, heads, tokens, keys)."""

    last_hidden_state: Any = None
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@pytree
class FlaxBaseModelOutputWithPast(FlaxBaseModelOutput):
    """The same under transformers' name for models with a cache."""


@pytree
class FlaxBaseModelOutputWithPastAndCrossAttentions(FlaxBaseModelOutputWithPast):
    """The same; `cross_attentions` is always None, as no family has cross-attention."""

    cross_attentions: tuple[Any, ...] | None = None


@pytree
class FlaxBaseModelOutputWithPooling(FlaxModelOutput):
    """Shapes: last_hidden_state (batch, tokens, width); pooler_output (batch, width)."""

    last_hidden_state: Any = None
    pooler_output: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@pytree
class FlaxMaskedLMOutput(FlaxModelOutput):
    """Shapes: logits (batch, tokens, vocab)."""

    logits: Any = None
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


# One class under two names, as in transformers.
FlaxCausalLMOutput = FlaxMaskedLMOutput


@pytree
class FlaxCausalLMOutputWithCrossAttentions(FlaxMaskedLMOutput):
    """The same; `cross_attentions` is always None, as no family has cross-attention."""

    cross_attentions: tuple[Any, ...] | None = None


@pytree
class FlaxSequenceClassifierOutput(FlaxModelOutput):
    """Shapes: logits (batch, labels)."""

    logits: Any = None
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@pytree
class FlaxTokenClassifierOutput(FlaxModelOutput):
    """Shapes: logits (batch, tokens, labels)."""

    logits: Any = None
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@pytree
class FlaxMultipleChoiceModelOutput(FlaxModelOutput):
    """Shapes: logits (batch, choices)."""

    logits: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@pytree
class FlaxQuestionAnsweringModelOutput(FlaxModelOutput):
    """Shapes: start_logits and end_logits (batch, tokens)."""

    start_logits: Any = None
    end_logits: Any = None
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@pytree
class FlaxDoubleHeadsModelOutput(FlaxModelOutput):
    """Shapes: logits (batch, choices, tokens, vocab); mc_logits (batch, choices)."""

    logits: Any = None
    mc_logits: Any = None
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


# transformers' Flax has no separate class for these outputs: it used the one on the right.
_SHARED = {
    "CausalLMOutputWithPast": "CausalLMOutputWithCrossAttentions",
    "SequenceClassifierOutputWithPast": "SequenceClassifierOutput",
}


@functools.cache
def output_class(name: str) -> type[FlaxModelOutput]:
    """The Flax class of an output name in a family's table; AttributeError if there is none."""
    name = "Flax" + _SHARED.get(name, name)
    if (found := globals().get(name)) is not None:
        return found
    if not name.endswith("DoubleHeadsModelOutput"):
        raise AttributeError(f"monoblock has no output class {name!r}")
    # transformers names it after the family that has double heads.
    body = {"__module__": __name__, "__doc__": FlaxDoubleHeadsModelOutput.__doc__}
    return pytree(type(name, (FlaxDoubleHeadsModelOutput,), body))


def __getattr__(name: str) -> type[FlaxModelOutput]:
    return output_class(name.removeprefix("Flax"))
