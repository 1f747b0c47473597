"""The head kinds as data: what each projects, how it pools, and which outputs and labels it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from monoblock.spec import Norm

Pool = Literal["all", "last", "first"]


# Arguments that have an axis of choices where input_ids or inputs_embeds have one.
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

    `labels`: its label arguments. `pool`: which hidden states are projected: all, the last that is not padding,
    or the first. `dense`: the activation of a square layer before the projection (None: there is none), whose
    input drops out too if `drop_in`. `size`: the outputs of the projection (None: there is none).
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
    """The choice head of a double head: which hidden state, the projection's width (None: no projection), the
    activation after it, and the dropouts before and after."""

    pool: Literal["last", "first", "mean", "cls_index"]
    size: int | None
    tanh: bool
    dropout_in: float
    dropout_out: float


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """A head as one model has it: its kind, and the numbers that the config gives.

    `dropout` acts on what is projected. `norm` follows the dense layer. `pad_id` tells where a row ends.
    `last_by`: by what a row's last token is found where both a pad id and an attention mask can say it: the last that
    is not the pad token, as in transformers, or the last that the mask keeps, whatever its id.
    `problem_type` fixes the loss of a head over sequences; None infers it from the labels of each call.
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
        """The number of outputs of the projection; None if there is no projection."""
        size = KINDS[self.kind].size
        return None if size is None else {"vocab": vocab, "labels": self.labels, "two": 2, "one": 1}[size]
