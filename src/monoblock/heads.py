"""The head kinds as data: what each projects, how it pools, and which outputs and labels it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class HeadKind:
    """A kind of head. `output` names its class in `outputs`; `labels` its label arguments, in order.

    `pool`: which hidden state is classified: each one, or the last that is not padding. `size`: the width of
    the projection.
    """

    output: str
    labels: tuple[str, ...]
    size: Literal["vocab", "labels", "two"]
    pool: Literal["none", "last"] = "none"
    bias: bool = True


KINDS: dict[str, HeadKind] = {
    "causal": HeadKind(output="CausalLMOutputWithPast", labels=("labels",), size="vocab", bias=False),
    "sequence": HeadKind(
        output="SequenceClassifierOutputWithPast", labels=("labels",), size="labels", pool="last", bias=False
    ),
    "token": HeadKind(output="TokenClassifierOutput", labels=("labels",), size="labels"),
    "span": HeadKind(
        output="QuestionAnsweringModelOutput", labels=("start_positions", "end_positions"), size="two"
    ),
}


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """A head as one model has it: its kind, and the numbers that the config gives.

    `dropout` acts on the hidden states before the projection. `pad_id` tells where a row ends. `problem_type`
    fixes the loss of a sequence head; None infers it from the labels of each call.
    """

    kind: str
    labels: int = 2
    dropout: float = 0.0
    problem_type: str | None = None
    pad_id: int | None = None

    def size(self, vocab: int) -> int:
        """The number of outputs of the projection."""
        return {"vocab": vocab, "labels": self.labels, "two": 2}[KINDS[self.kind].size]
