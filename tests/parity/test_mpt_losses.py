"""The losses of the MPT heads and their gradients: against transformers, and by the definition where it ignores an
argument or fails."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from helpers import CLASSES, KIND, PADDINGS, batch, randomised
from measure import assert_close
from mpt_pairs import LABELLED, LABELS, TOKENS, VOCAB, fields, labels_of, logits_of, pair

import monoblock

ATOL = 1e-5  # fp32; losses up to 20, measured 2e-6
GRADIENT_ATOL = 1e-5  # gradients of a mean loss are below 1, measured 6e-6

# ---------------------------------------------------------------------------- losses and gradients


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ["MptForCausalLM", "MptForTokenClassification"])
def test_token_losses_and_gradients(name: str, padding: str) -> None:
    theirs, ours = pair(name)
    ids, mask = batch(padding)
    labels = labels_of(ids, mask, VOCAB if name == "MptForCausalLM" else LABELS)
    check_gradients(name, theirs, ours, ids, mask, labels=labels)


def test_causal_loss_with_a_count() -> None:
    theirs, ours = pair("MptForCausalLM")
    ids, mask = batch("left")
    check_gradients(
        "counted", theirs, ours, ids, mask, labels=labels_of(ids, mask, VOCAB), num_items_in_batch=77
    )


SEQUENCE_LABELS = {
    "one class": (LABELS, None, torch.tensor([2, 0, 3])),
    "multi-hot": (LABELS, None, torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0], [1, 1, 1, 0]])),
    "a number": (1, None, torch.tensor([0.3, -1.7, 2.5])),
    "several numbers": (
        LABELS,
        "regression",
        torch.randn(3, LABELS, generator=torch.Generator().manual_seed(0)),
    ),
    "said: one class": (LABELS, "single_label_classification", torch.tensor([1, 1, 2])),
    "said: multi-hot": (LABELS, "multi_label_classification", torch.ones(3, LABELS)),
}


@pytest.mark.parametrize("case", SEQUENCE_LABELS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_sequence_losses_and_gradients(case: str, padding: str) -> None:
    count, problem, labels = SEQUENCE_LABELS[case]
    theirs, ours = pair("MptForSequenceClassification", labels=count)
    ids, mask = batch(padding)
    theirs.config.problem_type = ours.config.problem_type = problem
    try:
        check_gradients(f"sequence, {case}", theirs, ours, ids, mask, labels=labels)
        assert ours.config.problem_type == problem, "the type is inferred for one call only"
    finally:
        theirs.config.problem_type = ours.config.problem_type = None


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    "ends", [[7, 16, 12], [7, TOKENS, 999], [[7], [16], [12]]], ids=["in", "outside", "column"]
)
def test_span_losses_and_gradients(ends: list[Any], padding: str) -> None:
    theirs, ours = pair("MptForQuestionAnswering")
    ids, mask = batch(padding)
    check_gradients(
        "span",
        theirs,
        ours,
        ids,
        mask,
        start_positions=torch.tensor([4, 15, 8]),
        end_positions=torch.tensor(ends),
    )


def check_gradients(what: str, theirs: Any, ours: Any, ids: Any, mask: Any, **labels: Any) -> None:
    """The loss, and its gradients with respect to the inputs and to every parameter."""
    results = []
    for module in (theirs, ours):
        module.zero_grad()
        embeds = module.get_input_embeddings().weight.detach()[ids].requires_grad_()
        # Through ids for the table's gradient, through embeddings for the inputs'; a row is classified at the
        # same place in both, as only one of them knows the pad id.
        loss = module(ids, attention_mask=mask, **labels).loss
        loss.backward()
        by_embeds = None
        if "sequence" not in what:
            other = module(inputs_embeds=embeds, attention_mask=mask, **labels).loss
            other.backward()
            by_embeds = embeds.grad
            assert_close(f"{what} loss from embeddings", other, loss, 1e-6)
        grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        results.append((loss, by_embeds, grads))
    (loss_t, embeds_t, grads_t), (loss_o, embeds_o, grads_o) = results
    assert_close(f"{what} loss", loss_o, loss_t, ATOL)
    if embeds_t is not None:
        assert_close(f"{what} gradient of inputs", embeds_o, embeds_t, GRADIENT_ATOL, mask)
        assert embeds_t.abs().max() > 1e-4, "a gradient that says nothing"
    assert grads_o.keys() == grads_t.keys()
    for name, gradient in grads_t.items():
        assert_close(f"{what} gradients of parameters", grads_o[name], gradient, GRADIENT_ATOL)


# ---------------------------------------------------------------------------- where the definition decides


COUNTED = {
    "MptForTokenClassification": lambda ids: {"labels": labels_of(ids, None, LABELS)},
    "MptForQuestionAnswering": lambda _: {
        "start_positions": torch.tensor([1, 2, 3]),
        "end_positions": torch.tensor([9, 99, 4]),
    },
    "MptForSequenceClassification": lambda _: {"labels": torch.tensor([1, 2, 3])},
}


@pytest.mark.parametrize("count", [None, 5, torch.tensor(7)], ids=["mean", "5", "7"])
@pytest.mark.parametrize("name", COUNTED)
def test_every_loss_is_divided_by_the_count(name: str, count: Any) -> None:
    """transformers takes num_items_in_batch for the causal head only; accumulation needs it for all."""
    _, ours = pair(name)
    ids, _ = batch("none")
    given = COUNTED[name](ids)
    out = ours(ids, **given, num_items_in_batch=count)
    scores = logits_of(out).detach().double().numpy()
    number = None if count is None else int(count)
    if KIND[name] == "span":
        expected = oracle.span_loss(
            scores[..., 0], scores[..., 1], given["start_positions"], given["end_positions"], number
        )
    else:
        expected = oracle.cross_entropy(scores, given["labels"], number)
    assert_close("counted loss", out.loss, expected, ATOL)


@pytest.mark.parametrize(
    "problem", ["regression", "multi_label_classification", "single_label_classification"]
)
@pytest.mark.parametrize("count", [None, 10])
def test_sequence_losses_are_the_definition(problem: str, count: int | None) -> None:
    config = monoblock.MptConfig(**fields(6, problem_type=problem))
    ours = randomised(monoblock.MptForSequenceClassification(config)).eval()
    ids, mask = batch("right")
    labels = torch.tensor([[0.0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0]])
    labels = torch.tensor([3, 0, 1], dtype=torch.int32) if problem.startswith("single") else labels
    out = ours(ids, attention_mask=mask, labels=labels, num_items_in_batch=count)
    scores = out.logits.detach().double().numpy()
    assert_close(
        "sequence loss", out.loss, oracle.sequence_loss(scores, labels.numpy(), problem, count), 1e-6
    )


@pytest.mark.parametrize("name", [name for name in CLASSES if KIND[name] in ("causal", "token", "span")])
def test_no_label_at_all_is_a_loss_of_zero(name: str) -> None:
    """transformers gives NaN, which ends a training run."""
    _, ours = pair(name)
    ids, _ = batch("none")
    nothing = torch.full_like(ids, -100)
    outside = torch.tensor([-1, TOKENS, 500])
    given = (
        {"start_positions": outside, "end_positions": outside}
        if KIND[name] == "span"
        else {"labels": nothing}
    )
    ours.zero_grad()
    loss = ours(ids, **given).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in ours.parameters())


def test_negative_span_positions_are_outside() -> None:
    """The page: positions outside the text are not taken into account. transformers takes -1 for the first token."""
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
    """transformers' losses refuse some of them."""
    _, ours = pair(name)
    ids = torch.arange(10, 22).reshape(2, 6)
    narrow = {key: value.int() for key, value in LABELLED[KIND[name]].items()}
    assert torch.equal(ours(ids, **narrow).loss, ours(ids, **LABELLED[KIND[name]]).loss)


def test_the_problem_type_is_inferred_for_each_call() -> None:
    """transformers writes it into the config at the first call."""
    _, ours = pair("MptForSequenceClassification")
    ids = torch.arange(10, 22).reshape(2, 6)
    hot = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]])
    first = ours(ids, labels=hot).loss
    ours(ids, labels=torch.tensor([1, 2]))
    assert torch.equal(ours(ids, labels=hot).loss, first)
    scores = ours(ids).logits.detach().double().numpy()
    assert_close("multi-hot", first, oracle.sequence_loss(scores, hot, "multi_label_classification"), 1e-6)
