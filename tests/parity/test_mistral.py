"""Mistral against transformers: sliding windows, grouped heads, and every RoPE scaling as `rope_scaling` and as
`rope_parameters`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import PADDINGS, expected, expected_logits
from measure import assert_close, rounding
from tiny_families import assert_same_logits, fields, model_inputs, model_pair, monoblock_model

from monoblock import MistralConfig
from monoblock.errors import UnsupportedConfig

ATOL = 2e-5  # fp32 through the fused kernels, values of the order of 10: measured 1.1e-5
NAME = "MistralForCausalLM"

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SCALINGS: dict[str, dict[str, Any]] = {
    "none": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": YARN,
    "yarn, betas": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5},
    "yarn, attention_factor": {**YARN, "attention_factor": 1.7},
    "yarn, mscale": {**YARN, "mscale": 0.9, "mscale_all_dim": 0.4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.5,
        "high_freq_factor": 3.0,
    },
}


def scaled(case: str, spelling: str, **more: Any) -> dict[str, Any]:
    """A config with that scaling; the trained length (14) is less than that of the inputs (23)."""
    rope = {**SCALINGS[case], "rope_theta": 300.0}
    if case == "dynamic":
        more["max_position_embeddings"] = 14
    if spelling == "new":
        return fields("mistral", rope_parameters=rope, **more)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    given = fields("mistral", rope_theta=theta, rope_scaling={"type": kind, **rope}, **more)
    return {k: v for k, v in given.items() if k != "rope_parameters"}


@pytest.mark.parametrize("spelling", ["flat", "new"])
@pytest.mark.parametrize("case", SCALINGS)
@torch.no_grad()
def test_rope_scaling(case: str, spelling: str) -> None:
    theirs, ours = model_pair(NAME, **scaled(case, spelling))
    for padding in PADDINGS:
        ids, mask = model_inputs(NAME, padding)
        out = ours(ids, attention_mask=mask, output_hidden_states=True)
        found, bound = out.logits, rounding(ours.spec, out)
        if case != "dynamic" or mask is None:
            assert_close(f"Mistral, {case}", found, theirs(ids, attention_mask=mask).logits, bound, mask)
        # Dynamic angles follow a row's own length here, and the batch's longest row in transformers.
        defined = expected_logits(ours, expected(ours, ids, mask))
        assert_close(f"Mistral, {case}, oracle", found, defined, bound, mask)
    plain = monoblock_model(NAME, theirs, **scaled("none", "new"))
    assert (case == "none") == torch.equal(plain(ids).logits, ours(ids).logits), (
        "the scaling must have an effect"
    )


def test_both_forms_of_the_fields_give_the_same_spec() -> None:
    for case in SCALINGS:
        flat, new = (MistralConfig(**scaled(case, spelling)).to_spec() for spelling in ("flat", "new"))
        assert flat == new


WINDOWS = {"none": None, "one": 1, "two": 2, "seven": 7, "as long as the input": 23, "longer": 4096}


@pytest.mark.parametrize("window", WINDOWS)
@torch.no_grad()
def test_windows(window: str) -> None:
    theirs, ours = model_pair(NAME, **fields("mistral", sliding_window=WINDOWS[window]))
    assert_same_logits(f"Mistral, window {window}", NAME, theirs, ours)


@pytest.mark.parametrize(
    "shape",
    [
        {"num_attention_heads": 6, "num_key_value_heads": 1},
        {"num_attention_heads": 6, "num_key_value_heads": 3},
        {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8},
        {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": None},
        {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16},
        {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4, "hidden_size": 20},
    ],
    ids=str,
)
@torch.no_grad()
def test_heads(shape: dict[str, Any]) -> None:
    theirs, ours = model_pair(NAME, **fields("mistral", **shape))
    ids, mask = model_inputs(NAME, "left")
    assert_close(
        "Mistral, heads",
        ours(ids, attention_mask=mask).logits,
        theirs(ids, attention_mask=mask).logits,
        ATOL,
        mask,
    )


def test_num_key_value_heads_none_is_multi_head() -> None:
    """Older configs have None for as many key heads as query heads; transformers 5 raises."""
    assert MistralConfig(num_key_value_heads=None).to_spec().attention.kv_heads == 32


@pytest.mark.parametrize(
    "act",
    ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "relu", "relu2", "swish"],
)
@torch.no_grad()
def test_activations(act: str) -> None:
    theirs, ours = model_pair(NAME, **fields("mistral", hidden_act=act))
    ids, _ = model_inputs(NAME, "none")
    assert_close(f"Mistral, {act}", ours(ids).logits, theirs(ids).logits, ATOL)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hidden_act": "mish"}, "MistralConfig.hidden_act='mish' is not supported: it must be 'gelu' or"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2.0}},
            "rope_scaling.rope_type='longrope' is not supported",
        ),
        ({"rope_scaling": {"type": "linear"}}, "lacks its factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "rope_scaling.truncate=False"),
    ],
)
def test_unsupported_fields_raise(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedConfig) as error:
        MistralConfig(**given).to_spec()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_key_value_heads": 5}, "heads (32) must be a multiple of kv_heads (5)"),
        ({"head_dim": 7}, "rotary dim must be even"),
        (
            {"hidden_size": 100},
            "MistralConfig.hidden_size (100) must be a multiple of num_attention_heads (32)",
        ),
        ({"sliding_window": 0}, "window of layer 0 must be at least 1 key, got 0"),
    ],
)
def test_inconsistent_fields_raise(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        MistralConfig(**given).to_spec()
    assert message in str(error.value)
