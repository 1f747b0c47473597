"""GPT-1 against transformers: summary options, activations, and the double heads."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from helpers import parameters
from measure import assert_close
from tiny_families import CHOICES, fields, model_inputs, model_pair, monoblock_model, pair, theirs_inputs

from monoblock import OpenAIGPTConfig, OpenAIGPTDoubleHeadsModel
from monoblock.errors import UnsupportedConfig

ATOL = 2e-5  # fp32 through the fused kernels
DOUBLE = "OpenAIGPTDoubleHeadsModel"
LM = "OpenAIGPTLMHeadModel"


@pytest.mark.parametrize("to_labels", [True, False])
@pytest.mark.parametrize("use_proj", [True, False])
@pytest.mark.parametrize("act", [None, "tanh"])
@pytest.mark.parametrize("kind", ["cls_index", "last", "first", "mean"])
@torch.no_grad()
def test_summary_options(kind: str, act: str | None, use_proj: bool, to_labels: bool) -> None:
    summary = {"summary_type": kind, "summary_activation": act, "summary_use_proj": use_proj}
    theirs, ours = model_pair(DOUBLE, **fields("openai-gpt", **summary, summary_proj_to_labels=to_labels))
    ids, _ = model_inputs(DOUBLE, "none")
    positions = torch.tensor([[3, 22], [0, 11], [22, 7]])
    for given in ({}, {"mc_token_ids": positions}):
        found = ours(ids, **given)
        # "last", "first" and "mean" apply to each choice; transformers applies them across the choices, so it gets
        # the choices as rows.
        by_rows = kind != "cls_index"
        there = theirs(ids.flatten(0, 1)) if by_rows else theirs(ids, **given)
        expected = there.mc_logits.unflatten(0, (3, CHOICES)) if by_rows else there.mc_logits
        assert_close("choices", found.mc_logits, expected, ATOL)
        assert_close("tokens", found.logits, there.logits.reshape(found.logits.shape), ATOL)


def test_summary_activations() -> None:
    """The documentation: any value but tanh means none; transformers applies the named activation. So it raises."""
    with pytest.raises(
        UnsupportedConfig, match=r"OpenAIGPTConfig.summary_activation='relu' is not supported"
    ):
        OpenAIGPTDoubleHeadsModel(OpenAIGPTConfig(**fields("openai-gpt", summary_activation="relu")))


def test_summary_type_attn_raises() -> None:
    with pytest.raises(
        UnsupportedConfig, match=r"OpenAIGPTConfig.summary_type='attn' is not supported: it must be"
    ):
        OpenAIGPTDoubleHeadsModel(OpenAIGPTConfig(**fields("openai-gpt", summary_type="attn")))


@torch.no_grad()
def test_double_heads_of_plain_rows() -> None:
    """Rows without choices: one score each."""
    theirs, ours = pair(DOUBLE)
    ids, _ = model_inputs(LM, "none")
    found, there = ours(ids), theirs(ids)
    assert found.mc_logits.shape == there.mc_logits.shape == (3,)
    assert_close("plain rows", found.mc_logits, there.mc_logits, ATOL)
    assert_close("plain rows", found.logits, there.logits, ATOL)


@torch.no_grad()
def test_mc_token_ids_of_padded_choices() -> None:
    """transformers fails on a mask of (batch, choices, tokens), and takes one of rows."""
    theirs, ours = pair(DOUBLE)
    ids, mask = model_inputs(DOUBLE, "right")
    last = mask.sum(-1) - 1
    types = (ids * 5) % 89
    given = theirs_inputs(DOUBLE, ids, mask)
    there = theirs(**given, mc_token_ids=last, token_type_ids=types)
    found = ours(ids, attention_mask=mask, mc_token_ids=last, token_type_ids=types)
    assert_close("choices", found.mc_logits, there.mc_logits, ATOL)
    assert found.mc_logits.shape == (3, CHOICES)


def test_both_losses_in_one_call() -> None:
    theirs, ours = pair(DOUBLE)
    ids, _ = model_inputs(DOUBLE, "none")
    labels = {"labels": ids, "mc_labels": torch.tensor([1, 0, 1])}
    found, there = ours(ids, **labels), theirs(ids, **labels)
    assert_close("loss", found.loss, there.loss, ATOL)
    assert_close("loss of choices", found.mc_loss, there.mc_loss, ATOL)
    as_tuple = ours(ids, **labels, return_dict=False)
    assert [x.shape for x in as_tuple] == [x.shape for x in theirs(ids, **labels, return_dict=False)]


@pytest.mark.parametrize("act", ["gelu", "relu", "silu", "swish"])
@torch.no_grad()
def test_activations(act: str) -> None:
    theirs, ours = model_pair(LM, **fields("openai-gpt", afn=act))
    ids, _ = model_inputs(LM, "none")
    assert_close(f"afn={act}", ours(ids).logits, theirs(ids).logits, ATOL)


@torch.no_grad()
def test_gelu_is_the_tanh_approximation() -> None:
    """The documentation offers "gelu_new", which fails in transformers; GPT-1's "gelu" is the same function."""
    theirs, _ = model_pair(LM, **fields("openai-gpt", afn="gelu"))
    ours = monoblock_model(LM, theirs, **fields("openai-gpt", afn="gelu_new"))
    ids, _ = model_inputs(LM, "none")
    assert_close("gelu_new", ours(ids).logits, theirs(ids).logits, ATOL)
    with pytest.raises(UnsupportedConfig, match=r"OpenAIGPTConfig.afn='mish' is not supported: it must be"):
        OpenAIGPTConfig(afn="mish").to_spec()


@torch.no_grad()
def test_padded_inputs_equal_the_oracle() -> None:
    """transformers masks future tokens with -10000, which large scores exceed, so the oracle is the reference."""
    _, ours = pair(LM)
    ids, mask = model_inputs(LM, "left")
    run = oracle.run(ours.spec, parameters(ours), ids.numpy(), mask.numpy())
    found = ours(ids, attention_mask=mask, output_hidden_states=True)
    for a, b in zip(found.hidden_states, run.hidden_states, strict=True):
        assert_close("GPT-1, oracle", a, b, ATOL, mask)


@torch.no_grad()
def test_more_tokens_than_positions_raise() -> None:
    _, ours = pair(LM)
    with pytest.raises(
        ValueError,
        match="64 learned positions, but the sequence, cache included, has 70 tokens: shorten it",
    ):
        ours(torch.randint(10, 80, (1, 70)))


def test_key_value_cache() -> None:
    """transformers ignores use_cache for GPT-1."""
    _, ours = pair(LM)
    ids, _ = model_inputs(LM, "none")
    whole = ours(ids).logits
    past: Any = None
    logits = []
    for chunk in ids.split(5, dim=1):
        out = ours(chunk, past_key_values=past, use_cache=True)
        past = out.past_key_values if "past_key_values" in out else past
        logits.append(out.logits)
    assert_close("GPT-1 cached", torch.cat(logits, 1), whole, ATOL)
