"""Tests that need a CUDA GPU: captured graphs, attention, quantised matrices. `pytest -m gpu` runs only these."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from helpers import batch, model
from measure import assert_close
from mpt_cases import CASES, LENGTHS, mpt_model
from tiny_families import CLASSES as FAMILY_OF
from tiny_families import GENERATING, fields, model_inputs, monoblock_model

from monoblock import MptForCausalLM
from monoblock.backends.pytorch.generation import cuda_graphs
from monoblock.backends.pytorch.kernels import attention_cuda, attention_flex, quantized_cuda
from monoblock.backends.pytorch.kernels.attention import Kernel, attend_eager
from monoblock.backends.pytorch.ops import Scope
from monoblock.backends.pytorch.quantization import formats

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is here"),
]

NEW = 40
ATOL = 1e-4  # fp32 on another device: a different order of summation, values of about 10


@pytest.fixture(autouse=True)
def _short_graphs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sequences outgrow their captured graph; float32 products use float32."""
    monkeypatch.setattr(cuda_graphs, "MIN_LENGTH", 32)
    monkeypatch.setattr(cuda_graphs, "ROOM", 1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def moved(ids: torch.Tensor, mask: Any) -> tuple[torch.Tensor, Any]:
    return ids.to(DEVICE), None if mask is None else mask.to(DEVICE)


def both(module: Any, ids: Any, mask: Any, **given: Any) -> tuple[Any, Any]:
    """Outputs of `generate` with captured graphs and without."""
    options = {
        "max_new_tokens": NEW,
        "eos_token_id": -1,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    options |= given
    replayed = module.generate(ids, attention_mask=mask, **options)
    assert cuda_graphs._kept[module], "a graph was captured"
    return replayed, module.generate(ids, attention_mask=mask, cache_implementation="dynamic", **options)


def compare(replayed: Any, plain: Any, bound: float = ATOL) -> None:
    assert_close("replayed steps", torch.stack(replayed.logits), torch.stack(plain.logits), bound)
    assert torch.equal(replayed.sequences, plain.sequences)


# ---------------------------------------------------------------------------- captured graphs


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", GENERATING)
def test_families(name: str, padding: str) -> None:
    module = monoblock_model(name, **fields(FAMILY_OF[name]))
    ids, mask = model_inputs(name, padding)
    here = module.generate(ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=-1)
    module.to(DEVICE)
    replayed, plain = both(module, *moved(ids, mask))
    compare(replayed, plain)
    assert torch.equal(replayed.sequences.cpu(), here), "as on the CPU"


@pytest.mark.parametrize("case", [case for case in CASES if case != "rope, dynamic"])
def test_options(case: str) -> None:
    compare(*both(mpt_model(case).to(DEVICE), *moved(*batch("left", LENGTHS))))


@pytest.mark.parametrize(
    "given", [{"num_beams": 3}, {"do_sample": True, "seed": 3}, {"guidance_scale": 1.7}], ids=str
)
def test_strategies(given: dict[str, Any]) -> None:
    replayed, plain = both(model().to(DEVICE), *moved(*batch("left", LENGTHS)), output_logits=False, **given)
    assert torch.equal(replayed.sequences, plain.sequences)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: Any) -> None:
    module = model(attn={"attn_type": "grouped_query_attention", "kv_n_heads": 2}, head_dim=32).to(
        DEVICE, dtype
    )
    replayed, plain = both(module, *moved(*batch("left", LENGTHS)))
    # Before sequences may diverge at a tie: rounding of logits up to 16.
    assert_close("16 bits", replayed.logits[1], plain.logits[1], 32 * torch.finfo(dtype).eps)


def test_new_weights() -> None:
    module, (ids, mask) = model().to(DEVICE), moved(*batch("none", (9,)))
    first = both(module, ids, mask)[0]
    with torch.no_grad():
        module.at("final_norm").weight.mul_(-1)
    replayed, plain = both(module, ids, mask)
    compare(replayed, plain)
    assert not torch.equal(replayed.sequences, first.sequences)
    module.at("final_norm").weight = torch.nn.Parameter(-module.at("final_norm").weight.detach())
    compare(*both(module, ids, mask))


def test_memory_is_freed_with_the_model() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    module, (ids, mask) = model().to(DEVICE), moved(*batch("none", (9,)))
    both(module, ids, mask)
    del module, ids, mask
    gc.collect()
    torch.cuda.synchronize()
    # PyTorch's workspaces for matrix products may stay.
    assert torch.cuda.memory_allocated() - before < 64 << 20


# ---------------------------------------------------------------------------- kernels


def heads(keys: int, queries: int, dtype: Any, width: int = 128) -> Any:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 8, queries, width), (2, 2, keys, width), (2, 2, keys, width))
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def scope_of(keys: int, queries: int, **given: Any) -> Scope:
    valid = torch.ones(2, keys, dtype=torch.bool, device=DEVICE)
    valid[1, : keys // 3] = False
    index = torch.arange(keys, device=DEVICE)
    slopes = torch.tensor([2.0**-i for i in range(1, 9)], device=DEVICE)
    return Scope(
        index_q=index[keys - queries :],
        index_k=index,
        causal=True,
        aligned=keys == queries,
        valid_bk=valid,
        slopes_h=slopes,
        **given,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("window", [None, 100])
def test_one_query_with_split_keys(dtype: Any, window: int | None) -> None:
    scope, kernel = scope_of(1024, 1, window=window), Kernel(scale=0.0884)
    q, k, v = heads(1024, 1, dtype)
    assert attention_cuda.kv_splits(4, 1024) == 8
    out = attention_cuda.attend(q, k, v, scope, kernel)
    expected = attend_eager(q.float(), k.float(), v.float(), scope, kernel)[0]
    assert_close("splits", out, expected, max(1e-4, 8 * torch.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prompts_through_flash(dtype: Any) -> None:
    scope, kernel = scope_of(500, 500), Kernel(scale=0.0884)
    q, k, v = heads(500, 500, dtype)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        out = attention_cuda.attend(q, k, v, scope, kernel)
    assert out is not None
    expected = attend_eager(q.float(), k.float(), v.float(), scope, kernel)[0]
    visible = ~scope.fully_masked()[:, 0, :, 0]  # pyright: ignore
    assert_close(
        "flash",
        out.transpose(1, 2),
        expected.transpose(1, 2),
        16 * torch.finfo(dtype).eps,
        visible.expand(2, 500),
    )


@pytest.mark.parametrize("window", [None, 270])
def test_flex_attention(window: int | None) -> None:
    scope, kernel = scope_of(620, 620, window=window), Kernel(scale=0.0884, softcap=5.0)
    q, k, v = heads(620, 620, torch.bfloat16)
    out = attention_flex.attend(q, k, v, scope, kernel)
    expected = attend_eager(q.float(), k.float(), v.float(), scope, kernel)[0]
    visible = ~scope.fully_masked()[:, 0, :, 0]  # pyright: ignore
    assert_close("flex", out.transpose(1, 2), expected.transpose(1, 2), 0.06, visible.expand(2, 620))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("bits", "group"), [(8, 64), (8, 128), (4, 64), (4, 128)])
@pytest.mark.parametrize("rows", [1, 5, 16, 40])
@torch.no_grad()
def test_quantised_products(rows: int, bits: int, group: int, dtype: Any) -> None:
    made = formats.pack(torch.randn(300, 1000, device=DEVICE), bits, group)
    x, bias = torch.randn(rows, 1000, device=DEVICE).to(dtype), torch.randn(300, device=DEVICE).to(dtype)
    y = quantized_cuda.multiply(x, made, bias)
    numbers = made.unpack(torch.float64)
    # Sums of 1,000 products, of the order of 100.
    bound = 1e-3 if dtype == torch.float32 else 200 * torch.finfo(dtype).eps
    assert_close("packed", y, x.double() @ numbers.T + bias.double(), bound)


def test_from_pretrained_to_the_gpu(tmp_path: Any) -> None:
    model().save_pretrained(tmp_path)
    loaded = MptForCausalLM.from_pretrained(tmp_path, device_map=DEVICE, dtype="bfloat16")
    assert {p.device.type for p in loaded.parameters()} == {DEVICE}
    assert loaded.generate(batch("none", (9,))[0].to(DEVICE), max_new_tokens=3).device.type == DEVICE
