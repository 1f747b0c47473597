"""GPT Neo against transformers: global and local layers, unscaled scores, and learned positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import PADDINGS, expected, expected_logits
from measure import assert_close, rounding
from tiny_families import PADS, fields, model_inputs, model_pair, theirs_inputs

from monoblock import GPTNeoConfig

ATOL = 2e-5  # fp32 through the fused kernels
NAME = "GPTNeoForCausalLM"

TYPES = {
    "pairs": [[["global", "local"], 2]],
    "all local": [[["local"], 3]],
    "all global": [[["global"], 2]],
    "mixed": [[["global"], 1], [["local", "global"], 1]],
}


@pytest.mark.parametrize("window", [1, 4, 11, 256])
@pytest.mark.parametrize("case", TYPES)
@torch.no_grad()
def test_layers_and_windows(case: str, window: int) -> None:
    layers = sum(len(kinds) * count for kinds, count in TYPES[case])
    given = fields("gpt_neo", attention_types=TYPES[case], num_layers=layers, window_size=window)
    theirs, ours = model_pair(NAME, **given)
    for padding in PADDINGS:
        ids, mask = model_inputs(NAME, padding)
        there = theirs(**theirs_inputs(NAME, ids, mask), output_hidden_states=True)
        bound = rounding(ours.spec, there)
        for kernel in ("sdpa", "eager"):
            ours.set_attn_implementation(kernel)
            found = ours(ids, attention_mask=mask).logits
            # Rows whose window holds padding alone are left to rounding in transformers, so padding is not compared.
            assert_close(f"GPT Neo, {case}, window {window}", found, there.logits, bound, mask)
            defined = expected_logits(ours, expected(ours, ids, mask))
            assert_close("GPT Neo, oracle", found, defined, bound, mask)


@torch.no_grad()
def test_scores_are_not_scaled() -> None:
    theirs, ours = model_pair(NAME, **fields("gpt_neo"))
    assert ours.spec.attention.scale == 1.0
    ids, _ = model_inputs(NAME, "none")
    assert_close("scores", ours(ids).logits, theirs(ids).logits, ATOL)


@torch.no_grad()
def test_scores_beyond_float16() -> None:
    """Unscaled scores grow large: they are computed in fp32, as in the original implementation."""
    _, ours = model_pair(NAME, **fields("gpt_neo"))
    ids, mask = model_inputs(NAME, "left")
    for i in range(ours.spec.layers):
        ours.at("q", i).weight.mul_(60)
        ours.at("k", i).weight.mul_(60)
    attention = ours.at("attention", 0)
    x = ours.at("norm1", 0)(ours.get_input_embeddings()(ids))
    q, k, _ = attention.heads(*(attention.role(role)(x) for role in "qkv"))
    assert (q @ k.mT).abs().max() > torch.finfo(torch.float16).max
    half = ours.to(torch.float16)
    for kernel in ("sdpa", "eager"):
        half.set_attn_implementation(kernel)
        assert torch.isfinite(half(ids, attention_mask=mask).logits).all()


@pytest.mark.parametrize("inner", [None, 20])
@torch.no_grad()
def test_intermediate_size(inner: int | None) -> None:
    theirs, ours = model_pair(NAME, **fields("gpt_neo", intermediate_size=inner))
    assert ours.spec.mlp.width == (inner or 4 * 36)
    ids, _ = model_inputs(NAME, "none")
    assert_close("intermediate_size", ours(ids).logits, theirs(ids).logits, ATOL)


def test_attention_types_must_match_num_layers() -> None:
    with pytest.raises(ValueError, match="names 4 layers, but num_layers is 3: expected one of global and"):
        GPTNeoConfig(**fields("gpt_neo", attention_types=[[["global", "local"], 2]], num_layers=3)).to_spec()
    with pytest.raises(ValueError, match="expected one of global and local for each layer"):
        GPTNeoConfig(attention_types=[[["global", "sparse"], 12]]).to_spec()


@torch.no_grad()
def test_more_tokens_than_positions_raise() -> None:
    _, ours = model_pair(NAME, **fields("gpt_neo"))
    long = torch.randint(10, 80, (1, 65))
    with pytest.raises(
        ValueError, match="64 learned positions, but the sequence, cache included, has 65 tokens"
    ):
        ours(long)
    mask = torch.ones_like(long)
    mask[:, :2] = 0
    assert ours(long.masked_fill(mask == 0, PADS["gpt_neo"]), attention_mask=mask).logits.shape == (1, 65, 89)


def test_attention_layers_are_expanded_attention_types() -> None:
    config: Any = GPTNeoConfig()
    assert config.attention_layers == ["global", "local"] * 12
    assert config.to_spec().windows == (None, 256) * 12
