"""How the logits of two models compare, whichever framework ran them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LogitComparison:
    """Two models on the same random prompts: `prompts` of `length` tokens; the largest absolute difference of their
    first outputs (logits, or hidden states of a bare model), the largest magnitude among them, and the share of
    positions with the same largest entry."""

    prompts: int
    length: int
    difference: float
    magnitude: float
    agreement: float
