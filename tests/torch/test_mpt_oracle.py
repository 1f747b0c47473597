"""Every MPT option that transformers ignores, singly and together, equals the definition in tests/oracle.py: with
and without padding, in one block of queries and in several, by the fused and the eager kernel, with and without a
cache."""

from __future__ import annotations

import copy
import importlib.machinery
import sys
import types
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
    has_compiler,
    model,
    one_by_one,
    parameters,
)
from measure import assert_close

from monoblock import DynamicCache, MptForCausalLM, MptModel, StaticCache
from monoblock.backends.pytorch import attention

ATOL = 1e-5  # fp32, 2 layers, values of the order of 1 to 10: measured 7e-6
LENGTHS = (23, 9, 17)

ROPE = {"alibi": False, "rope": True}
HF_ROPE = {**ROPE, "rope_impl": "hf"}
LLAMA3 = {"type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16, "high_freq_factor": 3.0}

# name -> (attn_config, other fields). The sequence (23) is longer than twice each window.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alibi_bias_max": ({"alibi_bias_max": 16}, {}),
    "storywriter": ({"alibi_bias_max": 16, "clip_qkv": 6}, {"n_heads": 3}),
    "learned positions": ({"alibi": False}, {"learned_pos_emb": True}),
    "no positions": ({"alibi": False}, {"learned_pos_emb": False}),
    "qk_ln": ({"qk_ln": True, "clip_qkv": 0.8}, {}),
    "qk_ln with bias": ({"qk_ln": True}, {"no_bias": False}),
    "qk_gn": ({"qk_gn": True}, {"no_bias": False}),
    "qk_gn, grouped": ({"qk_gn": True, "attn_type": "grouped_query_attention", "kv_n_heads": 2}, {}),
    "qk_ln, grouped": ({"qk_ln": True, "attn_type": "grouped_query_attention", "kv_n_heads": 2}, {}),
    "multiquery": ({"attn_type": "multiquery_attention"}, {}),
    "grouped": ({"attn_type": "grouped_query_attention", "kv_n_heads": 3, "fused_qkv": False}, {}),
    "biases": ({}, {"no_bias": False}),
    "attention_bias": ({}, {"attention_bias": True}),
    "no attention_bias": ({}, {"attention_bias": False, "no_bias": False}),
    "logit_scale": ({}, {"logit_scale": 0.37}),
    "inv_sqrt_d_model": ({}, {"logit_scale": "inv_sqrt_d_model"}),
    "expansion_ratio": ({}, {"expansion_ratio": 2.5}),
    "embedding_fraction": ({}, {"embedding_fraction": 0.3}),
    "rope": (ROPE, {}),
    "rope_theta": ({**ROPE, "rope_theta": 300.0}, {}),
    "rope, hf": (HF_ROPE, {}),
    "rope, linear": ({**HF_ROPE, "rope_hf_config": {"type": "linear", "factor": 3.0}}, {}),
    "rope, dynamic": ({**HF_ROPE, "rope_hf_config": {"type": "dynamic", "factor": 2.5}}, {"max_seq_len": 8}),
    "rope, llama3": ({**HF_ROPE, "rope_hf_config": LLAMA3}, {}),
    "rope beside alibi": ({"rope": True, "alibi": True}, {}),
    "rmsnorm": ({}, {"norm_type": "rmsnorm"}),
    "norm_eps": ({}, {"norm_eps": 0.1}),
    "mptglu": ({}, {"ffn_config": {"ffn_type": "mptglu"}, "no_bias": False}),
    "ffn_hidden_size": ({}, {"ffn_config": {"ffn_hidden_size": 50}}),
    "sliding window": ({"sliding_window_size": 5}, {}),
    "sliding window of one": ({"sliding_window_size": 0}, {}),
    "sliding window, rope": ({**ROPE, "sliding_window_size": 7}, {}),
    "score cap": ({"attn_logit_softcapping": 0.9}, {}),
    "logit cap": ({}, {"final_logit_softcapping": 1.5}),
    "logit cap and scale": ({}, {"final_logit_softcapping": 1.5, "logit_scale": 3.0}),
    "untied": ({}, {"tie_word_embeddings": False}),
    "head_dim": ({}, {"head_dim": 10}),
    "head_dim, odd width": ({}, {"head_dim": 4, "d_model": 35}),
    "all at once": (
        {
            "alibi_bias_max": 5,
            "clip_qkv": 1.1,
            "qk_gn": True,
            "attn_type": "grouped_query_attention",
            "kv_n_heads": 2,
            "sliding_window_size": 6,
            "attn_logit_softcapping": 2.0,
            "softmax_scale": 0.4,
        },
        {
            "no_bias": False,
            "norm_type": "rmsnorm",
            "ffn_config": {"ffn_type": "mptglu", "ffn_hidden_size": 44, "ffn_act_fn": {"name": "silu"}},
            "logit_scale": 0.7,
            "final_logit_softcapping": 4.0,
            "tie_word_embeddings": False,
            "head_dim": 8,
            "layer_norm_epsilon": 1e-3,
        },
    ),
    **{
        f"activation {act}": ({}, {"ffn_config": {"ffn_act_fn": act}})
        for act in (
            {"name": "gelu", "approximate": "tanh"},
            {"name": "quick_gelu"},
            {"name": "relu"},
            {"name": "silu"},
        )
    },
}


def made(case: str) -> Any:
    attn, fields = CASES[case]
    module = model(attn=attn, **fields)
    if case == "storywriter":  # projections large enough for a clip of 6 to bite
        with torch.no_grad():
            for block in module.backbone.blocks:
                block.attn.qkv.weight *= 2
                block.attn.out.weight /= 2
    return module


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of queries where a text would fit in one."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_option(case: str) -> None:
    module = made(case)
    for padding in PADDINGS:
        ids, mask = batch(padding, LENGTHS)
        run = expected(module, ids, mask)
        for kernel in ("sdpa", "eager"):
            module.set_attn_implementation(kernel)
            out = module(ids, attention_mask=mask, output_hidden_states=True)
            for a, b in zip(out.hidden_states, run.hidden_states, strict=True):
                assert_close(f"{case}, states", a, b, ATOL, mask)
            assert_close(f"{case}, logits", out.logits, expected_logits(module, run), ATOL, mask)
        out = module(ids, attention_mask=mask, output_attentions=True)
        for a, b in zip(out.attentions, run.attentions, strict=True):
            assert_close(f"{case}, attentions", a.transpose(1, 2), b.swapaxes(1, 2), ATOL, mask)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_option_cached(case: str) -> None:
    """Growing = static = no cache, given in pieces and token by token; a row of a batch = the text alone."""
    module = made(case)
    if case == "rope, dynamic":
        # The angles of a token change as the text grows, so a deeper layer's cached states are those of a shorter
        # text: with one layer there are none.
        module = model(attn=CASES[case][0], **CASES[case][1], n_layers=1)
    for padding in PADDINGS:
        ids, mask = batch(padding, LENGTHS)
        whole = module(ids, attention_mask=mask).logits
        for sizes in (one_by_one(23, 15), (9, 13, 1)):
            for past in (DynamicCache(), StaticCache(max_cache_len=30)):
                if case == "rope, dynamic" and len(sizes) != 3:
                    continue
                logits = chunks(module, ids, mask, sizes, past)
                if case == "rope, dynamic":  # earlier pieces were seen by a shorter text's angles
                    assert_close(
                        f"{case}, cached",
                        logits[:, -1],
                        whole[:, -1],
                        ATOL,
                        None if mask is None else mask[:, -1],
                    )
                else:
                    assert_close(f"{case}, cached", logits, whole, ATOL, mask)
        if mask is not None:
            for row, real in enumerate(mask == 1):
                alone = module(ids[row, real][None]).logits[0]
                assert_close(f"{case}, alone", whole[row, real], alone, ATOL)


def test_storywriters_clip_bites() -> None:
    module = made("storywriter")
    ids, _ = batch("none")
    with_clip = expected(module, ids).hidden
    unclipped = copy.copy(module.spec)
    object.__setattr__(unclipped, "attention", copy.copy(module.spec.attention))
    object.__setattr__(unclipped.attention, "clip", None)
    without = oracle.run(unclipped, parameters(module), ids.numpy()).hidden
    assert np.abs(with_clip - without).max() > 0.01


def test_a_window_of_the_makers_is_one_key_less() -> None:
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


def test_sequence_id_without_the_option_is_refused() -> None:
    ids, _ = batch("none")
    with pytest.raises(ValueError, match="attn_uses_sequence_id"):
        model()(ids, sequence_id=torch.zeros_like(ids))


# ---------------------------------------------------------------------------- training


def test_embedding_fraction_scales_the_gradient() -> None:
    ids, mask = batch("left")
    grads = {}
    for fraction in (1.0, 0.3):
        module = model("MptModel", embedding_fraction=fraction)
        embeds = module.backbone.embed.weight.detach()[ids].requires_grad_()
        module(ids, attention_mask=mask)[0].square().mean().backward()
        module(inputs_embeds=embeds, attention_mask=mask)[0].square().mean().backward()
        grads[fraction] = module.backbone.embed.weight.grad, embeds.grad
    for part, whole in zip(grads[0.3], grads[1.0], strict=True):
        assert_close("gradient of the embedding", part, 0.3 * whole, 1e-7)
        assert whole.abs().max() > 1e-4


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("place", ["emb_pdrop", "resid_pdrop", "attn_pdrop"])
def test_each_dropout_acts_at_its_place(place: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dropout that multiplies by 1 + p, told from the parameters that would have the same effect."""
    p, factor = 0.25, 1.25
    attn, fields = ({place: p}, {}) if place == "attn_pdrop" else ({}, {place: p})
    module = model("MptModel", attn=attn, **fields)
    module.set_attn_implementation(kernel)
    ids, mask = batch("left")
    params = parameters(module)
    for name, value in params.items():
        if place == "emb_pdrop" and name == "embed.weight":
            params[name] = value * factor
        if place == "attn_pdrop" and name.endswith("attn.out.weight"):
            params[name] = value * factor
        if place == "resid_pdrop" and name.endswith(("attn.out.weight", "mlp.down.weight")):
            params[name] = value * factor
    run = oracle.run(module.spec, params, ids.numpy(), mask.numpy())

    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True, inplace=False: x * (1 + p * training))
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, dropout_p=0.0, **k: fused(*a, **k) * (1 + dropout_p)
    )
    assert_close(
        "no dropout at rest",
        module(ids, attention_mask=mask)[0],
        expected(module, ids, mask).hidden,
        ATOL,
        mask,
    )
    module.train()
    out = module(ids, attention_mask=mask, output_hidden_states=True)
    for a, b in zip(out.hidden_states, run.hidden_states, strict=True):
        assert_close(f"{place}, {kernel}", a, b, 2e-5, mask)  # states are 1.25 times as large here


@pytest.mark.parametrize("place", ["emb_pdrop", "resid_pdrop", "attn_pdrop"])
def test_dropout_is_random_in_training_only(place: str) -> None:
    attn, fields = ({place: 0.5}, {}) if place == "attn_pdrop" else ({}, {place: 0.5})
    module = model("MptModel", attn=attn, **fields)
    ids, _ = batch("none")
    assert torch.equal(module(ids)[0], module(ids)[0])
    module.train()
    assert not torch.equal(module(ids)[0], module(ids)[0])
    if place == "emb_pdrop":
        dropped = module(ids, output_hidden_states=True).hidden_states[0] == 0
        assert 0.4 < dropped.float().mean() < 0.6


@pytest.mark.parametrize(
    "case", ["alibi_bias_max", "grouped", "sliding window, rope", "score cap", "all at once"]
)
def test_gradients_in_blocks_are_those_of_the_eager_kernel(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are computed again in the backward pass; so are whole layers under gradient checkpointing."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    ids, mask = batch("left")
    labels = ids.masked_fill(mask == 0, -100)
    grads = []
    for kernel, again in (("eager", False), ("sdpa", False), ("sdpa", True)):
        module = made(case).train()
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


def test_learned_positions_end() -> None:
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
def test_a_long_text_keeps_its_precision() -> None:
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
def test_bf16_is_near(case: str) -> None:
    """bf16 has 8 bits: 0.4 % of each of some ten sums of values up to 10."""
    module = made(case)
    ids, mask = batch("left", LENGTHS)
    run = expected(module, ids, mask)
    half = copy.deepcopy(module).to(torch.bfloat16)
    for kernel in ("sdpa", "eager"):
        half.set_attn_implementation(kernel)
        out = half(ids, attention_mask=mask).logits
        assert out.dtype == torch.bfloat16
        assert_close("bf16", out, expected_logits(module, run), 0.3, mask)


# ---------------------------------------------------------------------------- kernels by name


@pytest.mark.skipif(not has_compiler(), reason="flex attention is compiled, and no C++ compiler is here")
@torch.no_grad()
def test_flex_attention() -> None:
    attn = {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "sliding_window_size": 9}
    module = model("MptModel", attn={**attn, "attn_logit_softcapping": 3.0}, head_dim=16, n_layers=1)
    module.set_attn_implementation("flex_attention")
    ids, mask = batch("left", LENGTHS)
    assert_close("flex", module(ids, attention_mask=mask)[0], expected(module, ids, mask).hidden, ATOL, mask)


def test_flex_attention_has_no_dropout() -> None:
    module = model(attn={"attn_pdrop": 0.1}).train()
    module.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="flex_attention has no attention dropout"):
        module(batch("none")[0])


def test_unknown_implementations() -> None:
    with pytest.raises(ValueError, match="eager, sdpa, flex_attention, flash_attention_2, got 'fast'"):
        MptForCausalLM(config(attn_implementation="fast"))
    module = model()
    with pytest.raises(ValueError, match="got 'xformers'"):
        module.set_attn_implementation("xformers")


def test_flash_attention_needs_a_gpu_and_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    module = model()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ImportError, match="needs a CUDA GPU"):
        module.set_attn_implementation("flash_attention_2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="pip install flash-attn"):
        module.set_attn_implementation("flash_attention_2")
    assert module.config._attn_implementation == "sdpa"


def flash_attn_func(q: Any, k: Any, v: Any, **given: Any) -> torch.Tensor:
    """What the package documents: (batch, tokens, heads, dim), the last query lines up with the last key, ALiBi is
    `-slope * |distance|`, a window of (left, right) keys, the cap on scaled scores."""
    flash_attn_func.calls.append(given)
    queries, keys, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * given["softmax_scale"]
    if given["softcap"]:
        scores = given["softcap"] * torch.tanh(scores / given["softcap"])
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    if given["alibi_slopes"] is not None:
        scores = scores - given["alibi_slopes"][None, :, None, None] * distance.abs()
    left, right = given["window_size"]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if given["causal"]:
        hidden |= distance < 0
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= -distance > right
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize(
    "case",
    ["alibi_bias_max", "multiquery", "sliding window", "sliding window, rope", "score cap", "all at once"],
)
@torch.no_grad()
def test_flash_attentions_arguments(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("flash_attn")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    package.flash_attn_func, flash_attn_func.calls = flash_attn_func, []
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    module = made(case)
    module.set_attn_implementation("flash_attention_2")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    ids, mask = batch("left", LENGTHS)
    run = expected(module, ids)
    assert_close("flash", module(ids).logits, expected_logits(module, run), ATOL)
    assert len(flash_attn_func.calls) == 2
    assert flash_attn_func.calls[0]["dropout_p"] == 0
    logits = chunks(module, ids, None, (9, 13, 1))
    assert_close("flash, cached", logits, expected_logits(module, run), ATOL)
    count = len(flash_attn_func.calls)
    padded = module(ids, attention_mask=mask).logits
    assert_close("flash, padded", padded, expected_logits(module, expected(module, ids, mask)), ATOL, mask)
    assert len(flash_attn_func.calls) == count, "padding is for the fused kernel"


def test_no_scores_array_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless attentions are asked for, nothing of heads x queries x keys is materialised."""
    monkeypatch.setattr(attention, "attend_eager", None)
    monkeypatch.setattr(attention, "_weights", None)
    module = model("MptModel")
    ids, mask = batch("left")
    assert isinstance(module, MptModel)
    module(ids, attention_mask=mask, output_hidden_states=True)
