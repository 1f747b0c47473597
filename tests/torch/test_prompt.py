"""Native prompt kernels against their formulas, chunked prompts, and the last block's few tokens."""

from __future__ import annotations

import ctypes
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import batch, model, same, traced_by_213
from measure import assert_close
from mpt_cases import LENGTHS, mpt_model
from test_families_cache import MPT, prompts
from test_families_cache import made as small
from tiny_families import GENERATING, model_inputs

from monoblock import DynamicCache, MistralConfig, MistralForCausalLM, StaticCache, native
from monoblock.backends.pytorch import ops
from monoblock.backends.pytorch.generation import decoder, native_decoder
from monoblock.backends.pytorch.kernels import native_ops
from monoblock.checkpoint import pages
from monoblock.errors import UnsupportedConfig
from monoblock.native import build
from monoblock.spec import ACTIVATIONS

ATOL = 2e-6  # fp32, values of about 1: measured 7e-7
DTYPES = {"float32": (torch.float32, ATOL), "bfloat16": (torch.bfloat16, 2e-2)}  # bf16 has steps of 4e-3 at 1

native_only = pytest.mark.skipif(native_ops.LIBRARY is None, reason=f"native kernels: {native.status()}")


@pytest.fixture(params=list(build.levels()))
def level(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set of this machine."""
    library, found, status = native.choose(request.param)
    if found != request.param:
        pytest.skip(f"no kernels of {request.param} here: {status}")
    monkeypatch.setattr(native_ops, "LIBRARY", library)
    return request.param


def heads(b: int, tokens: int, h: int, g: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values as views of one fused [q|k|v]."""
    qkv = torch.randn(b, tokens, (h + 2 * g) * d, generator=torch.Generator().manual_seed(d)).to(dtype)
    split = qkv.split([h * d, g * d, g * d], dim=-1)
    return tuple(x.unflatten(-1, (-1, d)).transpose(1, 2) for x in split)


def formula(q: Any, k: Any, v: Any, scale: float, **given: Any) -> torch.Tensor:
    """Attention in float64, (b, q, h, d); a fully masked query has equal weights."""
    q, (k, v) = q.double(), (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    if cap := given.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    queries, keys = scores.shape[-2:]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    if (slopes := given.get("slopes")) is not None:
        scores = scores - slopes.double()[:, None, None] * distance
    if (relative := given.get("relative")) is not None:
        scores = scores + relative.double()[relative.shape[0] // 2 - distance].movedim(-1, 0)
    visible = torch.ones_like(distance, dtype=torch.bool)[None, None]
    if given.get("causal", True):
        visible = visible & (distance >= 0)
    if window := given.get("window"):
        visible = visible & (distance < window)
    if (valid := given.get("valid")) is not None:
        visible = visible & valid[:, None, None]
    if (segments := given.get("segments")) is not None:
        visible = visible & (segments[:, None, -queries:, None] == segments[:, None, None])
    return (scores.masked_fill(~visible, -1e300).softmax(-1) @ v).transpose(1, 2)


def attention(q: Any, k: Any, v: Any, scale: float, **given: Any) -> torch.Tensor:
    masks = (given.get(name) for name in ("slopes", "valid", "segments", "relative"))
    return native_ops.attention(
        q, k, v, *masks, scale, given.get("softcap", 0.0), given.get("causal", True), given.get("window", 0)
    )


def _relative(reach: int, heads: int) -> torch.Tensor:
    return torch.randn(2 * reach + 1, heads, generator=torch.Generator().manual_seed(reach))


def _valid(share: float, keys: int) -> torch.Tensor:
    return torch.rand(2, keys, generator=torch.Generator().manual_seed(keys)) < share


# (queries, keys, heads, groups, head width), options. Tiles are 24 queries by 256 keys, panels 64 keys.
ATTENTION: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "one": ((1, 1, 1, 1, 8), {}),
    "tails": ((37, 37, 2, 2, 5), {}),
    "two blocks of keys": ((300, 300, 1, 1, 80), {}),
    "groups": ((50, 50, 8, 2, 64), {}),
    "one group": ((26, 26, 3, 1, 36), {}),
    "the last of the keys": ((7, 290, 4, 2, 16), {}),
    "one query": ((1, 270, 4, 2, 16), {"softcap": 3.0}),
    "window": ((290, 300, 2, 1, 16), {"window": 33}),
    "window of one": ((40, 40, 2, 1, 16), {"window": 1}),
    "alibi": ((90, 300, 4, 4, 16), {"slopes": torch.tensor([0.5, 0.25, 0.1, 0.01])}),
    "padding": ((70, 70, 2, 1, 24), {"valid": _valid(0.6, 70)}),
    "little but padding": ((70, 280, 2, 1, 24), {"valid": _valid(0.02, 280), "window": 9}),
    "bidirectional": ((70, 70, 2, 1, 24), {"valid": _valid(0.6, 70), "causal": False}),
    "segments": ((60, 70, 2, 1, 24), {"segments": (torch.arange(140).view(2, 70) // 23).int()}),
    "cap": ((60, 60, 2, 1, 24), {"softcap": 0.7}),
    "relative biases": ((290, 290, 3, 3, 24), {"relative": _relative(289, 3), "causal": False}),
    "relative biases, the last": (
        (9, 70, 4, 2, 16),
        {"relative": _relative(99, 4), "valid": _valid(0.6, 70)},
    ),
    "relative biases, cap": ((60, 60, 2, 1, 24), {"relative": _relative(59, 2), "softcap": 0.7}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ATTENTION)
def test_attention(level: str, case: str, dtype: str) -> None:
    (queries, keys, h, g, d), given = ATTENTION[case]
    kind, bound = DTYPES[dtype]
    q, k, v = heads(2, keys, h, g, d, kind)
    q = q[:, :, -queries:]
    out = attention(q, k, v, d**-0.5, **given)
    assert out.dtype == kind
    assert_close(f"attention, {dtype}", out, formula(q, k, v, d**-0.5, **given), bound)
    assert level == native.choose(level)[1]


@native_only
def test_alibi_is_exact_at_large_distances() -> None:
    """PyTorch's kernel adds slope * key, hundreds here, and is 4e-5 off; distances that matter are short."""
    q, k, v = heads(1, 2000, 1, 1, 16, torch.float32)
    slopes = torch.tensor([0.5])
    q = q[:, :, -40:]
    expected = formula(q, k, v, 0.25, slopes=slopes)
    assert_close("attention, ALiBi", attention(q, k, v, 0.25, slopes=slopes), expected, ATOL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [1, 300])
@pytest.mark.usefixtures("level")
def test_nan_and_infinity_are_propagated(keys: int, dtype: str) -> None:
    """NaN in a query, key or value gives NaN in the queries that attend to it and nowhere else."""
    kind, bound = DTYPES[dtype]
    index = keys // 2
    for changed, number in (("q", math.nan), ("k", math.nan), ("v", math.nan), ("k", math.inf)):
        given = dict(zip("qkv", (x.clone() for x in heads(1, keys, 2, 1, 16, kind)), strict=True))
        given["q"][:, :, index] = given["q"][:, :, index].abs()  # what the infinite key gives is largest here
        given[changed][:, :, index, 3] = number
        out, expected = attention(**given, scale=0.25), formula(**given, scale=0.25)
        if changed == "v":  # 0 * NaN of masked keys may be either
            out, expected = out[:, index:], expected[:, index:]
        assert expected.isnan().any()
        assert torch.equal(out.isnan(), expected.isnan()), f"{number} in {changed}"
        assert_close(f"attention beside {number}", out.nan_to_num(), expected.nan_to_num(), bound)


@native_only
@torch.inference_mode()
def test_steps_do_not_lose_nan() -> None:
    """One cached key that is NaN, one channel of an activation that would make 0 of it."""
    ids = batch("none")[0]
    for changed in ("key", "relu"):
        module = mpt_model("activation {'name': 'relu'}")
        cache = DynamicCache(config=module.spec)
        module(ids, past_key_values=cache, use_cache=True)
        steps = native_decoder.of(module, cache)
        assert steps is not None
        if changed == "key":
            cache.keys[0][:, 0, 2, 1] = math.nan
        else:
            module.at("up", 1).weight[5] = math.nan
        scores = steps.run(ids[:, :1])
        assert scores is not None
        assert scores.isnan().all(), changed


@native_only
def test_threads() -> None:
    q, k, v = heads(2, 300, 4, 2, 16, torch.float32)
    alone = attention(q, k, v, 0.25)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(attention(q, k, v, 0.25), alone)
    finally:
        torch.set_num_threads(before)


def test_unknown_activations_raise() -> None:
    with pytest.raises(ValueError, match="activation 6"):
        native_ops.activate(torch.ones(2, 8), 6, gated=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 16, 83])
@pytest.mark.usefixtures("level")
def test_norms_rotations_and_activations(width: int, dtype: str) -> None:
    """Against PyTorch in float64, at widths that fill vectors and that do not."""
    kind, bound = DTYPES[dtype]
    generator = torch.Generator().manual_seed(width)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(kind) for shape in ((2, 9, width), (width,), (width,))
    )
    # Far from 0 the mean has steps of 8e-6; a difference of sums of squares would be off by 1e-3. Not in bf16, whose
    # inputs have no such digits.
    far = x + 100 if dtype == "float32" else x
    expected = F.layer_norm(far.double(), (width,), weight.double(), bias.double(), 1e-3)
    assert_close(
        f"layer norm, {dtype}", native_ops.norm(far, weight, bias, 1e-3, rms=False), expected, 25 * bound
    )
    expected = F.rms_norm(x.double(), (width,), weight.double(), 1e-3)
    assert_close(f"rms norm, {dtype}", native_ops.norm(x, weight, None, 1e-3, rms=True), expected, 4 * bound)
    pair = torch.cat((20 * x, x), dim=-1)
    steep, up = pair.double().chunk(2, dim=-1)
    for code, name in enumerate(ACTIVATIONS):
        alone, gated = (native_ops.activate(pair, code, gated) for gated in (False, True))
        for found, wanted in ((alone, ops.ACT[name](pair.double())), (gated, ops.ACT[name](steep) * up)):
            torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=bound)
    q = heads(2, 9, 3, 1, 2 * width + 3, kind)[0]
    angles = torch.randn(1, 1, 9, width, generator=generator).double()
    cos, sin = (torch.cat((a, a), dim=-1).to(kind) for a in (angles.cos(), angles.sin()))
    rotated = native_ops.apply_rope(q, cos, sin).transpose(1, 2)
    assert_close(f"rotation, {dtype}", rotated, ops.rotate(q.double(), cos.double(), sin.double()), 2 * bound)


@native_only
@pytest.mark.parametrize("case", ["rope", "mptglu", "sliding window", "score cap"])
@torch.no_grad()
def test_models_use_the_kernels(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without gradients calls them, with equal outputs; one with gradients calls at most the activation, whose
    backward pass is PyTorch's."""
    module = mpt_model(case)
    ids, mask = batch("left", LENGTHS)
    called: list[str] = []
    for name in ("attention", "norm", "apply_rope", "activate"):
        kernel = getattr(native_ops, name)
        monkeypatch.setattr(
            native_ops, name, lambda *a, n=name, f=kernel, **k: (called.append(n), f(*a, **k))[1]
        )
    fast = module(ids, attention_mask=mask).logits
    assert {"attention", "norm", "activate"} <= set(called)
    assert ("apply_rope" in called) == (case == "rope")
    called.clear()
    with torch.enable_grad():
        module(ids, attention_mask=mask)
    assert set(called) <= {"activate"}
    called.clear()
    monkeypatch.setattr(native_ops, "LIBRARY", None)
    assert_close("logits without the kernels", fast, module(ids, attention_mask=mask).logits, 1e-5, mask)
    assert not called


@native_only
@torch.no_grad()
@traced_by_213
def test_exported_programs_need_no_kernels() -> None:
    """Exported programs contain PyTorch's operators only."""
    module = model("MptModel", n_layers=1)
    module.config.return_dict = False
    program = torch.export.export(module, (batch("none")[0],), {"use_cache": False})
    assert not [node for node in program.graph.nodes if "monoblock" in str(node.target)]


# ---------------------------------------------------------------------------- chunked prompts


CACHES: dict[str, Any] = {
    "growing": dict,
    "static": lambda: {"cache_implementation": "static"},
    "given": lambda: {"past_key_values": DynamicCache()},
    "given static": lambda: {"past_key_values": StaticCache(max_cache_len=80)},
}
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 3,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 3,
    "output_scores": True,
    "return_dict_in_generate": True,
}


def assert_same_in_chunks(
    monkeypatch: pytest.MonkeyPatch, module: Any, ids: Any, given: Any, chunks: int
) -> None:
    """Generation from a whole prompt equals that from one in `chunks` chunks of 4 tokens; `given()` makes other
    arguments."""
    outs, calls = {}, []
    arguments = decoder.CachedDecoder._arguments
    monkeypatch.setattr(
        decoder.CachedDecoder, "_arguments", lambda *a, **k: (calls.append(k), arguments(*a, **k))[1]
    )
    for size in (1024, 4):
        calls.clear()
        monkeypatch.setattr(decoder, "CHUNK", size)
        outs[size] = module.generate(ids, **{**OPTIONS, **given()})
    assert [call.get("left", 0) > 0 for call in calls].count(True) == chunks - 1
    assert torch.equal(outs[4].sequences, outs[1024].sequences)
    assert_close("scores in chunks", torch.stack(outs[4].scores), torch.stack(outs[1024].scores), 2e-5)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", [MPT, *GENERATING])
def test_chunked_prompts(name: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded, in unequal lengths, with windows longer and shorter than what is cached."""
    ids, mask = prompts(name)
    chunks = -(-ids.shape[1] // 4)
    assert_same_in_chunks(
        monkeypatch, small(name), ids, lambda: {"attention_mask": mask, **CACHES[cache]()}, chunks
    )


def test_chunks_of_other_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions, token types, embeddings, and a cache that holds the prompt's beginning."""
    module = small("OpenAIGPTLMHeadModel")
    ids, _ = model_inputs("OpenAIGPTLMHeadModel", "none")
    more = {
        "position_ids": torch.arange(ids.shape[1]).flip(0)[None] + 3,
        "token_type_ids": (torch.arange(ids.shape[1])[None] * 7 % 5).expand(len(ids), -1),
    }
    assert_same_in_chunks(monkeypatch, module, ids, lambda: more, -(-ids.shape[1] // 4))
    embeds = module.get_input_embeddings()(ids)
    assert_same_in_chunks(monkeypatch, module, None, lambda: {"inputs_embeds": embeds}, -(-ids.shape[1] // 4))

    def begun() -> dict[str, Any]:
        return {"past_key_values": module(ids[:, :5], use_cache=True).past_key_values}

    assert_same_in_chunks(monkeypatch, module, ids, begun, -(-(ids.shape[1] - 5) // 4))


def test_prompts_that_are_not_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """RoPE that depends on the length, quantised caches, hidden states and attentions, and no cache at all."""
    ids = batch("none")[0]
    assert_same_in_chunks(monkeypatch, mpt_model("rope, dynamic"), ids, dict, 1)
    module = model()
    for given in (
        {"cache_implementation": "quantized"},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"use_cache": False},
    ):
        assert_same_in_chunks(monkeypatch, module, ids, given.copy, 1)


def test_prefill_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """`prefill_chunk_size` holds on every device and for every cache; unsupported combinations raise."""
    ids, mask = prompts("MistralForCausalLM")
    module, counts = small("MistralForCausalLM"), []
    arguments = decoder.CachedDecoder._arguments

    def counted(self: Any, tokens: Any, *more: Any, **named: Any) -> Any:
        counts.append(tokens["input_ids"].shape[1])
        return arguments(self, tokens, *more, **named)

    monkeypatch.setattr(decoder.CachedDecoder, "_arguments", counted)
    given = {**OPTIONS, "attention_mask": mask}
    whole = module.generate(ids, **given)
    counts.clear()
    chunks = module.generate(ids, prefill_chunk_size=5, **given)
    count = ids.shape[1]
    assert counts[: -(-count // 5)] == [5] * (count // 5) + [count % 5] * (count % 5 > 0)
    assert torch.equal(chunks.sequences, whole.sequences)
    assert_close("scores in chunks", torch.stack(chunks.scores), torch.stack(whole.scores), 2e-5)
    with pytest.raises(
        UnsupportedConfig, match="prefill_chunk_size=5: this model's RoPE scaling depends on the whole"
    ):
        mpt_model("rope, dynamic").generate(batch("none")[0], prefill_chunk_size=5, **OPTIONS)
    for option in ("output_attentions=True", "use_cache=False"):
        name, value = option.split("=")
        with pytest.raises(ValueError, match=f"prefill_chunk_size=5 cannot be combined with {option}"):
            module.generate(ids, prefill_chunk_size=5, **{**given, name: value == "True"})


# ---------------------------------------------------------------------------- the last block


@pytest.mark.parametrize("name", [MPT, *GENERATING])
@torch.no_grad()
def test_the_last_block_computes_the_kept_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = small(name)
    ids, mask = prompts(name)
    whole = module(ids, attention_mask=mask, use_cache=True)
    counts: list[int] = []
    mlp = type(next(m for role in ("mlp", "mlp_add") if (m := module.at(role, 0)) is not None))
    forward = mlp.forward
    monkeypatch.setattr(
        mlp, "forward", lambda self, x, *more: (counts.append(x.shape[1]), forward(self, x, *more))[1]
    )
    for keep in (1, 4, 99):
        counts.clear()
        few = module(ids, attention_mask=mask, use_cache=True, logits_to_keep=keep)
        count = min(keep, ids.shape[1])
        assert counts == [ids.shape[1]] * (module.spec.layers - 1) + [count]
        assert_close(
            "logits of the last block's few", few.logits, whole.logits[:, -count:], 2e-5, mask[:, -count:]
        )
        for mine, other in zip(few.past_key_values, whole.past_key_values, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    counts.clear()
    states = module(ids, attention_mask=mask, logits_to_keep=1, output_hidden_states=True)
    assert states.hidden_states[-1].shape[1] == ids.shape[1] == counts[-1], "states are of all tokens"
    handle = module.at("layers")[-1].register_forward_hook(lambda *_: None)
    module(ids, attention_mask=mask, logits_to_keep=1)
    assert counts[-1] == ids.shape[1], "hooks get all tokens"
    handle.remove()


# ---------------------------------------------------------------------------- loading


@pytest.mark.skipif(sys.platform != "linux", reason="file pages are mapped side by side on Linux only")
def test_fused_matrices_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's q, k and v, gate and up become one matrix over its pages."""
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "num_hidden_layers": 1}
    settings = MistralConfig(vocab_size=16, hidden_size=1024, intermediate_size=4, **sizes)
    written = MistralForCausalLM(settings)
    written.save_pretrained(tmp_path)
    monkeypatch.setattr(pages, "MIN_BYTES", 0)
    joined: list[Any] = []
    join = pages.map_contiguous
    monkeypatch.setattr(
        pages, "map_contiguous", lambda matrices: (joined.append(join(matrices)), joined[-1])[1]
    )
    read = MistralForCausalLM.from_pretrained(tmp_path)
    fused = {read.at("q", 0).weight.data_ptr(), read.at("gate", 0).weight.data_ptr()}
    assert {ctypes.addressof(buffer) for buffer in joined} == fused
    assert same(read, written)
