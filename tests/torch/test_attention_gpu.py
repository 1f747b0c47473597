"""Inputs of CUDA's attention kernels and block masks of flex attention, computed on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import batch, chunks, expected, expected_logits, has_compiler, model
from measure import assert_close
from mpt_cases import CASES, LENGTHS, mpt_model

from monoblock.backends.pytorch.kernels import attention, attention_cuda, attention_flex
from monoblock.backends.pytorch.kernels.attention import Kernel, attend_eager
from monoblock.backends.pytorch.ops import Scope

ATOL = 1e-5  # fp32, as of the other kernels
SLOPES = torch.tensor([2.0 ** (-i / 4) for i in range(1, 9)])


def scope_of(keys: int, queries: int | None = None, **given: Any) -> Scope:
    queries = queries or keys
    index = torch.arange(keys)
    return Scope(
        index_q=index[keys - queries :],
        index_k=index,
        causal=given.pop("causal", True),
        aligned=queries == keys,
        **given,
    )


def heads(keys: int, queries: int, groups: int, dtype: Any = torch.float32, width: int = 16) -> Any:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 8, queries, width), (2, groups, keys, width), (2, groups, keys, width))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def padding(keys: int, left: int) -> torch.Tensor:
    valid = torch.ones(2, keys, dtype=torch.bool)
    valid[1, :left] = False
    return valid


# ---------------------------------------------------------------------------- one new token


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("case", ["plain", "alibi", "padding", "window", "all"])
def test_split_keys_equal_one_pass(case: str, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cuda, "FEWEST_KEYS", 16)
    keys = 192
    given: dict[str, Any] = {}
    if case in ("alibi", "all"):
        given["slopes_h"] = SLOPES
    if case in ("padding", "all"):
        given["valid_bk"] = padding(keys, 170)  # whole splits of one row are padding
    if case in ("window", "all"):
        given["window"] = 33
    scope, kernel = scope_of(keys, 1, **given), Kernel(scale=0.3)
    q, k, v = heads(keys, 1, groups)
    assert attention_cuda.kv_splits(2 * groups, keys) == 4
    out = attention_cuda.attend(q, k, v, scope, kernel)
    assert out is not None
    assert_close("splits", out, attend_eager(q, k, v, scope, kernel)[0], ATOL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fully_masked_splits_have_no_weight(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cuda, "FEWEST_KEYS", 16)
    scope = scope_of(256, 1, valid_bk=padding(256, 250), window=20)
    q, k, v = heads(256, 1, 8, dtype)
    out = attention_cuda.attend(q, k, v, scope, Kernel(scale=0.25))
    reference = attend_eager(q.float(), k.float(), v.float(), scope, Kernel(scale=0.25))[0]
    assert_close("few keys", out, reference, 4 * torch.finfo(dtype).eps)  # values of about 1


def test_number_of_splits() -> None:
    kv_splits = attention_cuda.kv_splits
    assert kv_splits(8, 2048) == 16  # 7B with grouped heads: 128 blocks of threads
    assert kv_splits(32, 2048) == 4
    assert kv_splits(8, 256) == 2  # no split is smaller than 128 keys
    assert kv_splits(128, 4096) == 1
    assert kv_splits(8, 1000) == 1  # masks of 500 keys would not be aligned
    for keys in (256, 512, 1024, 8192):
        assert keys // kv_splits(8, keys) % 16 == 0


def test_non_contiguous_keys_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A growing cache's keys are a view of a longer buffer: they are read whole, by the public function."""
    monkeypatch.setattr(attention_cuda, "FEWEST_KEYS", 16)
    monkeypatch.setattr(attention_cuda, "PARTIAL", {})
    q, k, v = heads(256, 1, 2)
    scope, kernel = scope_of(192, 1), Kernel(scale=0.3)
    out = attention_cuda.attend(q, k[:, :, :192], v[:, :, :192], scope, kernel)
    expected = attend_eager(q, k[:, :, :192], v[:, :, :192], scope, kernel)[0]
    assert_close("a view", out, expected, ATOL)


def test_shapes_of_the_split_kernel() -> None:
    """As PyTorch's meta kernel of CUDA gives them: logarithms of at least all queries."""
    q, k = torch.empty(2, 8, 4, 128, device="meta"), torch.empty(2, 8, 256, 128, device="meta")
    out, logs = attention_cuda.PARTIAL["cuda"](q, k, k, torch.empty(2, 8, 4, 256, device="meta"), 0.1)
    assert out.shape == q.shape
    assert logs.shape[:2] == (2, 8)
    assert logs.shape[2] >= 4
    assert logs.dtype == torch.float32


# ---------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.088, 1 / 256])
def test_bias_in_extra_channels_is_exact(dtype: Any, scale: float) -> None:
    """Products of the extra channels, as the kernels form them: exact numbers, summed in more precision."""
    keys = 100_000
    scope = scope_of(keys, slopes_h=SLOPES, valid_bk=padding(keys, 100))
    scope.index_q = scope.index_q[:1]
    q, k = torch.zeros(2, 8, 1, 16, dtype=dtype), torch.zeros(2, 2, keys, 16, dtype=dtype)
    more_q, more_k = attention_cuda.bias_channels(scope, scale, q, k)
    assert more_q.isfinite().all()
    assert more_k.isfinite().all()
    bias = (more_q.double() @ attention.repeat_groups(more_k, 8).double().mT)[:, :, 0] * scale
    # Two numbers of 8 (bf16) bits hold a slope to 17: positions are exact, slopes off by 1e-5 of themselves.
    assert_close("slopes", bias[0] / SLOPES[:, None], torch.arange(keys).expand(8, -1), keys * 2**-16)
    step = bias[0].diff(dim=1)
    assert_close("positions", step, step[:, :1].expand_as(step), 1e-9)
    assert (bias[1, :, :100] < -2e5).all(), "below every score and every slope times position"
    assert torch.equal(bias[1, :, 100:], bias[0, :, 100:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("groups", [2, 8])
@pytest.mark.parametrize("case", ["plain", "alibi", "padding", "both", "bidirectional"])
def test_prompts_through_flash(case: str, groups: int, dtype: Any) -> None:
    given: dict[str, Any] = {"causal": case != "bidirectional"}
    if case in ("alibi", "both"):
        given["slopes_h"] = SLOPES
    if case in ("padding", "both", "bidirectional"):
        given["valid_bk"] = padding(150, 20)
    scope, kernel = scope_of(150, **given), Kernel(scale=0.25)
    q, k, v = heads(150, 150, groups, dtype)
    out = attention_cuda.attend(q, k, v, scope, kernel)
    assert out is not None
    reference = attend_eager(q.float(), k.float(), v.float(), scope, kernel)[0]
    visible = (
        torch.ones(2, 150, dtype=torch.bool)
        if scope.fully_masked() is None
        else ~scope.fully_masked()[:, 0, :, 0]
    )
    assert_close(
        "flash",
        out.transpose(1, 2),
        reference.transpose(1, 2),
        8 * torch.finfo(dtype).eps,
        visible.expand(2, 150),
    )


def test_older_gpus_get_repeated_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the flash kernel, grouped heads would go to the formula, and its array of scores."""
    scope, kernel = scope_of(40, slopes_h=SLOPES), Kernel(scale=0.25)
    q, k, v = heads(40, 40, 2, torch.float16)
    grouped = attention_cuda.attend(q, k, v, scope, kernel)
    calls = []
    public = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **given: (
            calls.append((k.shape[1], given["enable_gqa"])),
            public(q, k, v, **given),
        )[1],
    )
    monkeypatch.setattr(attention_cuda, "has_flash", lambda _: False)
    assert_close("repeated", attention_cuda.attend(q, k, v, scope, kernel), grouped, 1e-2)  # fp16
    assert calls == [(8, False)]
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not attention_cuda.has_flash(torch.device("cuda", 7))


@pytest.mark.parametrize(
    ("scope", "kernel", "width", "dtype"),
    [
        (scope_of(20, 5), Kernel(scale=0.3), 16, torch.bfloat16),
        (scope_of(20, window=4), Kernel(scale=0.3), 16, torch.bfloat16),
        (scope_of(20), Kernel(scale=0.3, softcap=2.0), 16, torch.bfloat16),
        (scope_of(20), Kernel(scale=0.3, dropout=0.1), 16, torch.bfloat16),
        (scope_of(20), Kernel(scale=0.3), 16, torch.float32),
        (scope_of(20), Kernel(scale=0.3), 264, torch.bfloat16),
        (scope_of(20, slopes_h=SLOPES), Kernel(scale=0.3), 256, torch.bfloat16),
        (scope_of(20, slopes_h=SLOPES), Kernel(scale=0.001), 16, torch.float16),
        (scope_of(20, segment_bk=torch.zeros(2, 20)), Kernel(scale=0.3), 16, torch.bfloat16),
    ],
    ids=["chunk", "window", "cap", "dropout", "fp32", "wide", "wide with a bias", "fine scale", "packed"],
)
def test_cases_left_to_query_blocks(scope: Any, kernel: Any, width: int, dtype: Any) -> None:
    q, k, v = heads(20, len(scope.index_q), 2, dtype, width)
    assert attention_cuda.attend(q, k, v, scope, kernel) is None


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_models_with_the_gpu_kernels(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt, chunks and single tokens in fp32: the logits of the definition."""
    monkeypatch.setattr(attention_cuda, "DEVICES", ("cpu",))
    module = mpt_model(case)
    ids, mask = batch("left", LENGTHS)
    logits = expected_logits(module, expected(module, ids, mask))
    if case != "rope, dynamic":  # whose cached keys depend on the length
        assert_close("in chunks", chunks(module, ids, mask, (9, 12, 1, 1)), logits, 2 * ATOL, mask)
    assert_close("whole", module(ids, attention_mask=mask).logits, logits, 2 * ATOL, mask)


@torch.no_grad()
def test_gradients_of_extra_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    scope, kernel = scope_of(40, slopes_h=SLOPES, valid_bk=padding(40, 7)), Kernel(scale=0.25)
    found = []
    for function in (attention_cuda.attend, lambda *given: attend_eager(*given)[0]):
        with torch.enable_grad():
            q, k, v = (x.requires_grad_() for x in heads(40, 40, 2, torch.bfloat16))
            out = function(q, k, v, scope, kernel)
            out[:, :, 20:].float().square().sum().backward()
        found.append([x.grad.float() for x in (q, k, v)])
    for mine, theirs in zip(*found, strict=True):
        assert_close(
            "gradient", mine, theirs, 0.03 * float(theirs.abs().max())
        )  # bf16: a few units of 8 bits


# ---------------------------------------------------------------------------- flex attention


@pytest.mark.parametrize("queries", [300, 130, 44])
@pytest.mark.parametrize(
    ("causal", "window"), [(True, None), (True, 1), (True, 60), (True, 200), (False, None)]
)
@pytest.mark.parametrize("padded", [False, True])
def test_block_masks(
    queries: int, window: int | None, padded: bool, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`full` may omit full blocks, `some` may include empty ones, not the reverse; without padding both are exact."""
    monkeypatch.setattr(attention_flex, "BLOCK", 32)
    scope = scope_of(300, queries, causal=causal)
    scope = replace(scope, window=window, valid_bk=padding(300, 90) if padded else None)
    some, full = attention_flex.blocks(scope)
    visible = scope.visible(0, queries, 0, 300)[:, 0]
    tiles = torch.nn.functional.pad(visible, (0, -300 % 32, 0, -queries % 32))
    tiles = tiles.unflatten(2, (-1, 32)).unflatten(1, (-1, 32))
    any_visible, all_visible = tiles.any(4).any(2), tiles.all(4).all(2)
    assert torch.equal(full.expand_as(all_visible), all_visible)
    if padded:
        assert (some.expand_as(any_visible) >= any_visible).all()
    else:
        assert torch.equal(some.expand_as(any_visible), any_visible)
    assert full.shape[1:] == (-(-queries // 32), 10)


def test_blocks_of_packed_documents_are_never_full() -> None:
    scope = scope_of(300, segment_bk=torch.zeros(2, 300, dtype=torch.int64))
    some, full = attention_flex.blocks(scope)
    assert some.any()
    assert not full.any()


@pytest.mark.skipif(not has_compiler(), reason="flex attention needs a C++ compiler")
@torch.no_grad()
def test_flex_attention_over_several_blocks() -> None:
    """Skipped, full and partly visible blocks in one sequence, and the queries of padding."""
    attn = {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "sliding_window_size": 269}
    module = model("MptModel", attn=attn, head_dim=16, n_layers=1, max_seq_len=700)
    module.set_attn_implementation("flex_attention")
    ids, mask = batch("left", (620, 135))
    some, full = attention_flex.blocks(scope_of(620, window=270))
    assert (int(some.sum()), int(full.sum())) == (14, 3), (
        "of 15 at or below the diagonal, one is outside the window"
    )
    run = expected(module, ids, mask)
    hidden = module(ids, attention_mask=mask)[0]
    assert_close("flex", hidden, run.hidden, 2e-5, mask)
    module.set_attn_implementation("sdpa")
    assert_close("padding too", hidden, module(ids, attention_mask=mask)[0], 2e-5)
