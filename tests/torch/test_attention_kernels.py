"""Attention implementations by name: flex, flash, and errors for unavailable ones."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import pytest
import torch
from helpers import batch, chunks, config, expected, expected_logits, has_compiler, model
from measure import assert_close
from mpt_cases import LENGTHS, mpt_model

from monoblock import MptForCausalLM, MptModel
from monoblock.backends.pytorch.kernels import attention

ATOL = 1e-5  # fp32, 2 layers, values of 1 to 10: measured 3e-6


@pytest.mark.skipif(not has_compiler(), reason="flex attention needs a C++ compiler")
@torch.no_grad()
def test_flex_attention() -> None:
    attn = {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "sliding_window_size": 9}
    module = model("MptModel", attn={**attn, "attn_logit_softcapping": 3.0}, head_dim=16, n_layers=1)
    module.set_attn_implementation("flex_attention")
    ids, mask = batch("left", LENGTHS)
    assert_close("flex", module(ids, attention_mask=mask)[0], expected(module, ids, mask).hidden, ATOL, mask)


@torch.no_grad()
def test_float64_is_exact() -> None:
    """With ALiBi and padding, whose bias the kernel would read as float32's bytes."""
    module = model("MptModel").double()
    ids, mask = batch("left", LENGTHS)
    # Angles and slopes are float32; the slopes of 6 heads are powers of 2.
    assert_close(
        "float64", module(ids, attention_mask=mask)[0], expected(module, ids, mask).hidden, 1e-12, mask
    )


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
    assert module.config._attn_implementation is None, "unset"
    assert module.at("attention", 0).implementation == "sdpa"


def flash_attn_func(q: Any, k: Any, v: Any, **given: Any) -> torch.Tensor:
    """The documented behaviour of flash-attn: (batch, tokens, heads, dim), the last query aligned with
    the last key, ALiBi is `-slope * |distance|`, a window of (left, right) keys, the cap on scaled scores."""
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
def test_arguments_of_flash_attention(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("flash_attn")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    package.flash_attn_func, flash_attn_func.calls = flash_attn_func, []
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    module = mpt_model(case)
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
    assert len(flash_attn_func.calls) == count, "padded inputs use the fused kernel"


def test_no_score_matrix_is_materialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless attentions are requested, no array of heads x queries x keys is allocated."""
    monkeypatch.setattr(attention, "attend_eager", None)
    monkeypatch.setattr(attention, "_weights", None)
    module = model("MptModel")
    ids, mask = batch("left")
    assert isinstance(module, MptModel)
    module(ids, attention_mask=mask, output_hidden_states=True)
