"""What Flax models return: the hub's output classes, which are pytrees besides.

`past_key_values` is there where a cache came in; as everywhere, fields that are None are left out of the tuple. There
is no loss: `model.compute_loss(outputs, labels=...)` makes it.
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
    """A dataclass that JAX's transformations take and return, field by field."""
    made = dataclass(cls)
    names = [field.name for field in fields(made)]
    return jax.tree_util.register_dataclass(made, data_fields=names, meta_fields=[])


class FlaxModelOutput(ModelOutput):
    """The base of all outputs."""

    def replace(self, **changes: Any) -> Self:
        """A copy with these fields changed."""
        return replace(self, **changes)  # pyright: ignore[reportArgumentType, reportUnknownVariableType]


@pytree
class FlaxBaseModelOutput(FlaxModelOutput):
    """Shapes: last_hidden_state (batch, tokens, width); hidden_states layers + 1 of it; attentions, one for
    each layer, (batch, heads, tokens, keys)."""

    last_hidden_state: Any = None
    past_key_values: Any = None
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None


@pytree
class FlaxBaseModelOutputWithPast(FlaxBaseModelOutput):
    """The same, as the hub names it where a model has a cache."""


@pytree
class FlaxBaseModelOutputWithPastAndCrossAttentions(FlaxBaseModelOutputWithPast):
    """The same; `cross_attentions` is always None, as no family here has any."""

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


# One class under two names, as the hub has it.
FlaxCausalLMOutput = FlaxMaskedLMOutput


@pytree
class FlaxCausalLMOutputWithCrossAttentions(FlaxMaskedLMOutput):
    """The same; `cross_attentions` is always None, as no family here has any."""

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


# The hub's Flax has no class of its own for these outputs: its classes returned the one on the right.
_SHARED = {
    "CausalLMOutputWithPast": "CausalLMOutputWithCrossAttentions",
    "SequenceClassifierOutputWithPast": "SequenceClassifierOutput",
}


@functools.cache
def output_class(name: str) -> type[FlaxModelOutput]:
    """The Flax class for the output that a family's table names; AttributeError if there is none."""
    name = "Flax" + _SHARED.get(name, name)
    if (found := globals().get(name)) is not None:
        return found
    if not name.endswith("DoubleHeadsModelOutput"):
        raise AttributeError(f"monoblock has no output class {name!r}")
    # The hub names it for the family that has double heads.
    body = {"__module__": __name__, "__doc__": FlaxDoubleHeadsModelOutput.__doc__}
    return pytree(type(name, (FlaxDoubleHeadsModelOutput,), body))


def __getattr__(name: str) -> type[FlaxModelOutput]:
    return output_class(name.removeprefix("Flax"))
