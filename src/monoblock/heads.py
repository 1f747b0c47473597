"""The kinds of heads as data: pooling, projection, outputs and label arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from monoblock.spec import Norm

Pool = Literal["all", "last", "first"]


# Arguments with an axis of choices in multiple choice, as input_ids and inputs_embeds have.
CHOICE_INPUTS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "sequence_id",
    "inputs_embeds",
)


@dataclass(frozen=True, kw_only=True)
class HeadKind:
    """A kind of head.

    `labels`: its label arguments. `pool`: the hidden states that are projected: all, the last one that is not padding,
    or the first. `dense`: the activation of a (width, width) layer before the projection (None: no such layer); with
    `drop_in`, dropout is also applied to its input. `size`: the number of outputs (None: no projection).
    """

    labels: tuple[str, ...] = ("labels",)
    pool: Pool = "all"
    dense: Literal["tanh", "gelu"] | None = None
    drop_in: bool = True
    size: Literal["vocab", "labels", "two", "one"] | None = "labels"
    bias: bool = True


KINDS: dict[str, HeadKind] = {
    "causal": HeadKind(size="vocab", bias=False),
    "masked": HeadKind(size="vocab", dense="gelu"),
    "double": HeadKind(labels=("labels", "mc_labels"), size="vocab", bias=False),
    "sequence": HeadKind(pool="last", bias=False),
    "first": HeadKind(pool="first", dense="tanh"),
    "choice": HeadKind(pool="first", dense="tanh", drop_in=False, size="one"),
    "pooler": HeadKind(labels=(), pool="first", dense="tanh", drop_in=False, size=None),
    "token": HeadKind(),
    "span": HeadKind(labels=("start_positions", "end_positions"), size="two"),
}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The choice head of a double head: pooling, the projection's outputs (None: no projection), the activation after
    it, and the dropout probabilities before and after."""

    pool: Literal["last", "first", "mean", "cls_index"]
    size: int | None
    tanh: bool
    dropout_in: float
    dropout_out: float


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """The head of a model: its kind, and values from the config.

    `dropout` is applied before the projection. `norm` follows the dense layer. `last_by`: how the last token of a row
    is located if both `pad_id` and an attention mask are given: the last one that is not `pad_id`, as in transformers,
    or the last unmasked one. `problem_type` selects the loss of a sequence head; None infers it from the labels.
    """

    kind: str
    labels: int = 2
    dropout: float = 0.0
    problem_type: str | None = None
    pad_id: int | None = None
    last_by: Literal["pad_id", "attention_mask"] = "pad_id"
    norm: Norm | None = None
    summary: Summary | None = None

    def __post_init__(self) -> None:
        summary = self.summary
        for p in (self.dropout, *((summary.dropout_in, summary.dropout_out) if summary else ())):
            if not 0 <= p < 1:
                raise ValueError(f"the dropout of a {self.kind} head must be in [0, 1), got {p}")

    def size(self, vocab: int) -> int | None:
        """The number of outputs; None if there is no projection."""
        size = KINDS[self.kind].size
        return None if size is None else {"vocab": vocab, "labels": self.labels, "two": 2, "one": 1}[size]
