"""Logits and hidden states at padding equal transformers': a span's loss includes them, and the second head of GPT-1
reads them by default."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import assert_close
from tiny_families import (
    KIND,
    PADS,
    fields,
    logits_of,
    model_inputs,
    model_pair,
    pair,
    per_token,
    theirs_inputs,
)
from tiny_families import (
    MODEL_TYPES as CLASSES,
)

# fp32, 3 layers, states up to 12, the fused kernels: measured 6e-6.
ATOL = 2e-5

TOKENS = [name for name in CLASSES if per_token(name)]
SPANS = [name for name in CLASSES if KIND[name] == "span"]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", TOKENS)
@torch.no_grad()
def test_logits_at_padding(name: str, padding: str, kernel: str) -> None:
    """transformers gets the positions of GPT-1 and GPT Neo under left padding, as it counts the padding."""
    theirs, ours = pair(name)
    ids, mask = model_inputs(name, padding)
    expected = theirs(**theirs_inputs(name, ids, mask), output_hidden_states=True)
    ours.set_attn_implementation(kernel)
    found = ours(ids, attention_mask=mask, output_hidden_states=True)
    ours.set_attn_implementation(None)
    assert_close(f"{name} at padding", logits_of(found), logits_of(expected), ATOL)
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert_close(f"{name} states at padding", a, b.reshape(a.shape), ATOL)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("name", SPANS)
def test_span_losses_of_padded_rows(name: str, window: int | None) -> None:
    """With right padding and no positions; and the gradients of every parameter."""
    model_type = CLASSES[name]
    more: dict[str, Any] = {
        "mistral": {"sliding_window": window},
        "gpt_neo": {"window_size": window or 64},
    }.get(model_type, {})
    theirs, ours = model_pair(name, **fields(model_type, num_labels=2, **more))
    ids, mask = model_inputs(name, "right")
    spans = {"start_positions": torch.tensor([3, 1, 4]), "end_positions": torch.tensor([9, 5, 12])}
    losses = [model(ids, attention_mask=mask, **spans).loss for model in (ours, theirs)]
    assert_close(f"{name} loss", losses[0], losses[1], 5e-6)
    if window is not None:
        return  # masked scores have a gradient in transformers, and none here (docs/numerics.md)
    for loss in losses:
        loss.backward()
    wanted = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    found = ours_by_name(ours)
    for key, value in wanted.items():
        # transformers never trains the embedding of the pad id; here it may also be the eos.
        if key == "model.embed_tokens.weight":
            found[key][PADS[model_type]] = 0
        assert_close(f"{name} gradients", found[key], value, 1e-5)  # gradients of a mean loss are below 1


def ours_by_name(model: Any) -> dict[str, torch.Tensor]:
    """The gradients by transformers' names."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return model.hub_state_dict()


def test_embedding_and_position_of_padding_are_not_trained() -> None:
    """Of MPNet."""
    theirs, ours = model_pair("MPNetForQuestionAnswering", **fields("mpnet", num_labels=2))
    ids, mask = model_inputs("MPNetForQuestionAnswering", "right")
    spans = {"start_positions": torch.tensor([3, 1, 4]), "end_positions": torch.tensor([9, 5, 12])}
    for model in (theirs, ours):
        model(ids, attention_mask=mask, **spans).loss.backward()
    table = theirs.mpnet.embeddings
    for own, other in (
        (ours.at("embed").weight, table.word_embeddings.weight),
        (ours.at("pos_embed").weight, table.position_embeddings.weight),
    ):
        assert not own.grad[PADS["mpnet"]].any()
        assert_close("gradients of a table", own.grad, other.grad, 1e-5)
