"""The losses of the MPT heads by the definition, where transformers ignores an argument or fails."""

from __future__ import annotations

import oracle
import pytest
import torch
from helpers import CLASSES, KIND, batch, randomised
from measure import assert_close
from tiny_families import fields, pair

import monoblock

LABELLED = {
    "causal": {"labels": torch.ones(2, 6, dtype=torch.long)},
    "sequence": {"labels": torch.tensor([1, 2])},
    "token": {"labels": torch.ones(2, 6, dtype=torch.long)},
    "span": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
}


@pytest.mark.parametrize(
    "problem", ["regression", "multi_label_classification", "single_label_classification"]
)
@pytest.mark.parametrize("count", [None, 10])
def test_sequence_losses_equal_the_definition(problem: str, count: int | None) -> None:
    config = monoblock.MptConfig(**fields("mpt", problem_type=problem))
    ours = randomised(monoblock.MptForSequenceClassification(config)).eval()
    ids, mask = batch("right")
    labels = torch.tensor([[0.0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0]])
    labels = torch.tensor([3, 0, 1], dtype=torch.int32) if problem.startswith("single") else labels
    out = ours(ids, attention_mask=mask, labels=labels, num_items_in_batch=count)
    scores = out.logits.detach().double().numpy()
    assert_close(
        "sequence loss", out.loss, oracle.sequence_loss(scores, labels.numpy(), problem, count), 1e-6
    )


def test_negative_span_positions_are_ignored() -> None:
    """The documentation ignores positions outside the sequence; transformers' code takes -1 for the first token."""
    _, ours = pair("MptForQuestionAnswering")
    ids, _ = batch("none")
    out = ours(ids, start_positions=torch.tensor([-1, 4, 2]), end_positions=torch.tensor([3, 5, -100]))
    two = oracle.span_loss(
        out.start_logits.detach().numpy(),
        out.end_logits.detach().numpy(),
        torch.tensor([-1, 4, 2]),
        torch.tensor([3, 5, -100]),
    )
    assert_close("span loss", out.loss, two, 1e-6)


@pytest.mark.parametrize("name", [name for name in CLASSES if KIND[name]])
def test_int32_labels(name: str) -> None:
    """Some of transformers' losses raise for them."""
    _, ours = pair(name)
    ids = torch.arange(10, 22).reshape(2, 6)
    narrow = {key: value.int() for key, value in LABELLED[KIND[name]].items()}
    assert torch.equal(ours(ids, **narrow).loss, ours(ids, **LABELLED[KIND[name]]).loss)


def test_problem_type_is_inferred_at_each_call() -> None:
    """transformers stores it in the config at the first call."""
    _, ours = pair("MptForSequenceClassification")
    ids = torch.arange(10, 22).reshape(2, 6)
    hot = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]])
    first = ours(ids, labels=hot).loss
    ours(ids, labels=torch.tensor([1, 2]))
    assert torch.equal(ours(ids, labels=hot).loss, first)
    scores = ours(ids).logits.detach().double().numpy()
    assert_close("multi-hot", first, oracle.sequence_loss(scores, hot, "multi_label_classification"), 1e-6)
