"""Every MPT option that transformers ignores, singly and together, equals the definition in tests/oracle.py: with
and without padding, in one block of queries and in several, by the fused and the eager kernel, with and without a
cache."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    PADDINGS,
    batch,
    chunks,
    config,
    expected,
    expected_logits,
    model,
    one_by_one,
    parameters,
)
from measure import assert_close, rounding
from mpt_cases import CASES, LENGTHS, ROPE, mpt_model

from monoblock import DynamicCache, StaticCache
from monoblock.backends.pytorch.kernels import attention

ATOL = 1e-5  # fp32, 2 layers, values of the order of 1 to 10: measured 7e-6


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three query blocks where one would suffice."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_option(case: str) -> None:
    module = mpt_model(case)
    for padding in PADDINGS:
        ids, mask = batch(padding, LENGTHS)
        run = expected(module, ids, mask)
        scores = expected_logits(module, run)
        bound = rounding(module.spec, [run.hidden_states, scores])
        for kernel in ("sdpa", "eager"):
            module.set_attn_implementation(kernel)
            out = module(ids, attention_mask=mask, output_hidden_states=True)
            for a, b in zip(out.hidden_states, run.hidden_states, strict=True):
                assert_close(f"{case}, states", a, b, bound, mask)
            assert_close(f"{case}, logits", out.logits, scores, bound, mask)
        out = module(ids, attention_mask=mask, output_attentions=True)
        for a, b in zip(out.attentions, run.attentions, strict=True):
            assert_close(f"{case}, attentions", a.transpose(1, 2), b.swapaxes(1, 2), bound, mask)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_option_cached(case: str) -> None:
    """Growing, static and no cache are equal, also in chunks; a row of a batch equals its sequence alone."""
    module = mpt_model(case)
    if case == "rope, dynamic":
        # The angles of a token change as the text grows, so a deeper layer's cached states are those of a shorter
        # text: with one layer there are none.
        module = model(attn=CASES[case][0], **CASES[case][1], n_layers=1)
    for padding in PADDINGS:
        ids, mask = batch(padding, LENGTHS)
        out = module(ids, attention_mask=mask, output_hidden_states=True)
        whole, bound = out.logits, rounding(module.spec, out)
        for sizes in (one_by_one(23, 15), (9, 13, 1)):
            for past in (DynamicCache(), StaticCache(max_cache_len=30)):
                if case == "rope, dynamic" and len(sizes) != 3:
                    continue
                logits = chunks(module, ids, mask, sizes, past)
                if case == "rope, dynamic":  # earlier chunks used the angles of a shorter length
                    assert_close(
                        f"{case}, cached",
                        logits[:, -1],
                        whole[:, -1],
                        bound,
                        None if mask is None else mask[:, -1],
                    )
                else:
                    assert_close(f"{case}, cached", logits, whole, bound, mask)
        if mask is not None:
            for row, real in enumerate(mask == 1):
                alone = module(ids[row, real][None]).logits[0]
                assert_close(f"{case}, alone", whole[row, real], alone, bound)


def test_storywriters_clip_has_an_effect() -> None:
    module = mpt_model("storywriter")
    ids, _ = batch("none")
    with_clip = expected(module, ids).hidden
    unclipped = copy.copy(module.spec)
    object.__setattr__(unclipped, "attention", copy.copy(module.spec.attention))
    object.__setattr__(unclipped.attention, "clip", None)
    without = oracle.run(unclipped, parameters(module), ids.numpy()).hidden
    assert np.abs(with_clip - without).max() > 0.01


def test_upstream_windows_exclude_the_query() -> None:
    """sliding_window_size=W: W keys before the query, and its own."""
    assert config({"sliding_window_size": 5}).to_spec().windows == (6, 6)
    module = model(attn={"sliding_window_size": 5})
    ids, _ = batch("none")
    weights = module(ids, output_attentions=True).attentions[0][0, 0]
    assert (weights[20] > 0).nonzero().flatten().tolist() == [15, 16, 17, 18, 19, 20]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("more", [{}, {"sliding_window_size": 4}, {"alibi": False, "rope": True}])
@torch.no_grad()
def test_sequence_id(padding: str, more: dict[str, Any]) -> None:
    module = model(attn={"attn_uses_sequence_id": True, **more})
    ids, mask = batch(padding, LENGTHS)
    segments = torch.tensor([[0] * 7 + [1] * 9 + [2] * 7, [0] * 20 + [1] * 3, [4] * 12 + [2] * 11])
    run = expected(module, ids, mask, segments=segments)
    for kernel in ("sdpa", "eager"):
        module.set_attn_implementation(kernel)
        out = module(ids, attention_mask=mask, sequence_id=segments)
        assert_close("sequence_id", out.logits, expected_logits(module, run), ATOL, mask)
        logits = chunks(module, ids, mask, (9, 12, 1, 1), sequence_id=segments)
        assert_close("sequence_id, cached", logits, out.logits, ATOL, mask)
    assert (out.logits - module(ids, attention_mask=mask).logits).abs().max() > 0.01


@torch.no_grad()
def test_sequence_id_without_the_option() -> None:
    """It takes effect without the option, which only makes it required in training."""
    ids, _ = batch("none")
    segments = (torch.arange(ids.shape[1]) > 9).long().expand(ids.shape)
    found = model()(ids, sequence_id=segments).logits
    trained_option = model(attn={"attn_uses_sequence_id": True})(ids, sequence_id=segments).logits
    assert torch.equal(found, trained_option)
    assert (found - model()(ids).logits).abs().max() > 0.01


# ---------------------------------------------------------------------------- training


def test_embedding_fraction_scales_the_gradient() -> None:
    ids, mask = batch("left")
    grads = {}
    for fraction in (1.0, 0.3):
        module = model("MptModel", embedding_fraction=fraction)
        embeds = module.get_input_embeddings().weight.detach()[ids].requires_grad_()
        module(ids, attention_mask=mask)[0].square().mean().backward()
        module(inputs_embeds=embeds, attention_mask=mask)[0].square().mean().backward()
        grads[fraction] = module.get_input_embeddings().weight.grad, embeds.grad
    for part, whole in zip(grads[0.3], grads[1.0], strict=True):
        assert_close("gradient of the embedding", part, 0.3 * whole, 1e-7)
        assert whole.abs().max() > 1e-4


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("field", ["emb_pdrop", "resid_pdrop", "attn_pdrop"])
def test_each_dropout_field(field: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dropout that multiplies by 1 + p equals scaled parameters."""
    p, factor = 0.25, 1.25
    attn, fields = ({field: p}, {}) if field == "attn_pdrop" else ({}, {field: p})
    module = model("MptModel", attn=attn, **fields)
    module.set_attn_implementation(kernel)
    ids, mask = batch("left")
    params = parameters(module)
    for name, value in params.items():
        if field == "emb_pdrop" and name == "embed.weight":
            params[name] = value * factor
        if field == "attn_pdrop" and name.endswith("attn.out.weight"):
            params[name] = value * factor
        if field == "resid_pdrop" and name.endswith(("attn.out.weight", "mlp.down.weight")):
            params[name] = value * factor
    run = oracle.run(module.spec, params, ids.numpy(), mask.numpy())

    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True, inplace=False: x * (1 + p * training))
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, dropout_p=0.0, **k: fused(*a, **k) * (1 + dropout_p)
    )
    assert_close(
        "no dropout in evaluation",
        module(ids, attention_mask=mask)[0],
        expected(module, ids, mask).hidden,
        ATOL,
        mask,
    )
    module.train()
    out = module(ids, attention_mask=mask, output_hidden_states=True)
    for a, b in zip(out.hidden_states, run.hidden_states, strict=True):
        assert_close(f"{field}, {kernel}", a, b, 2e-5, mask)  # states are 1.25 times as large here


@pytest.mark.parametrize("field", ["emb_pdrop", "resid_pdrop", "attn_pdrop"])
def test_dropout_is_random_in_training_only(field: str) -> None:
    attn, fields = ({field: 0.5}, {}) if field == "attn_pdrop" else ({}, {field: 0.5})
    module = model("MptModel", attn=attn, **fields)
    ids, _ = batch("none")
    assert torch.equal(module(ids)[0], module(ids)[0])
    module.train()
    assert not torch.equal(module(ids)[0], module(ids)[0])
    if field == "emb_pdrop":
        dropped = module(ids, output_hidden_states=True).hidden_states[0] == 0
        assert 0.4 < dropped.float().mean() < 0.6


@pytest.mark.parametrize(
    "case", ["alibi_bias_max", "grouped", "sliding window, rope", "score cap", "all at once"]
)
def test_gradients_in_blocks_equal_the_eager_kernel(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are computed again in the backward pass; so are whole layers under gradient checkpointing."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    ids, mask = batch("left")
    labels = ids.masked_fill(mask == 0, -100)
    grads = []
    for kernel, again in (("eager", False), ("sdpa", False), ("sdpa", True)):
        module = mpt_model(case).train()
        module.set_attn_implementation(kernel)
        if again:
            module.gradient_checkpointing_enable()
        module(ids, attention_mask=mask, labels=labels).loss.backward()
        grads.append({name: p.grad for name, p in module.named_parameters()})
    for name, wanted in grads[0].items():
        assert_close("gradients", grads[1][name], wanted, ATOL)
        assert_close("gradients, checkpointed", grads[2][name], wanted, ATOL)


# ---------------------------------------------------------------------------- lengths and numbers


@pytest.mark.parametrize(
    "attn", [{}, ROPE, {"alibi_bias_max": 16}], ids=["alibi", "rope", "storywriter's alibi"]
)
@torch.no_grad()
def test_lengths_beyond_max_seq_len(attn: dict[str, Any]) -> None:
    module = model(attn=attn, max_seq_len=16, n_heads=3)
    ids, mask = batch("left", (300, 170))
    run = expected(module, ids, mask)
    assert_close(
        "beyond max_seq_len",
        module(ids, attention_mask=mask).logits,
        expected_logits(module, run),
        3e-5,
        mask,
    )


def test_more_tokens_than_learned_positions_raise() -> None:
    module = model(attn={"alibi": False}, max_seq_len=16)
    ids, mask = batch("left", (17, 5))
    assert module(ids[:, 1:]).logits.shape[1] == 16
    with pytest.raises(ValueError, match=r"16 learned positions.*17 tokens"):
        module(ids)
    past = module(ids[:, :10], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"16 learned positions.*17 tokens"):
        module(ids[:, 10:], past_key_values=past)
    assert module(ids[1:], attention_mask=mask[1:]).logits.shape[1] == 17, "padding takes no position"


@torch.no_grad()
def test_precision_of_long_inputs() -> None:
    """ALiBi's steepest slope reaches 1,000 here, where fp32 has steps of 6e-5. The eager and the block-wise kernel use
    distances and lose nothing; the flash kernel has one bias for all queries, from the middle: measured 7e-5."""
    module = model("MptModel", n_layers=1)
    ids = torch.randint(4, 89, (1, 2000), generator=torch.Generator().manual_seed(0))
    exact = expected(module, ids).hidden
    assert_close("2,000 tokens, flash", module(ids)[0], exact, 1e-4)
    module.set_attn_implementation("eager")
    assert_close("2,000 tokens, eager", module(ids)[0], exact, ATOL)


@pytest.mark.parametrize(
    "case", ["alibi_bias_max", "all at once", "rope, llama3", "sliding window", "score cap"]
)
@torch.no_grad()
def test_bf16_is_close(case: str) -> None:
    """bf16 has 8 bits: 0.4 % of each of some ten sums of values up to 10."""
    module = mpt_model(case)
    ids, mask = batch("left", LENGTHS)
    run = expected(module, ids, mask)
    half = copy.deepcopy(module).to(torch.bfloat16)
    for kernel in ("sdpa", "eager"):
        half.set_attn_implementation(kernel)
        out = half(ids, attention_mask=mask).logits
        assert out.dtype == torch.bfloat16
        assert_close("bf16", out, expected_logits(module, run), 0.3, mask)
