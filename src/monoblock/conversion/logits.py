"""The result of comparing the logits of two models, independent of the framework."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LogitComparison:
    """Two models on the same `prompts` random prompts of `length` tokens: largest absolute `difference` of their first
    outputs (logits, or hidden states of a bare model), largest `magnitude` of these, and `agreement`, the fraction of
    positions with the same argmax."""

    prompts: int
    length: int
    difference: float
    magnitude: float
    agreement: float


@dataclass(frozen=True, kw_only=True)
class GraphComparison:
    """An exported graph and its model on random sequences of these `shapes` (rows, cached tokens, new tokens): largest
    absolute `difference` of their outputs, largest `magnitude` of these, and `agreement`, the fraction of vectors with
    the same argmax (None: there are no vectors)."""

    shapes: tuple[tuple[int, int, int], ...]
    difference: float
    magnitude: float
    agreement: float | None
