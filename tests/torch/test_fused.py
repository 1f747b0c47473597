"""The native decode step against tests/oracle.py and the modules: every option and family, padding, windows, caches,
threads, and when it is not used."""

from __future__ import annotations

import copy
import ctypes
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import PAD, batch, expected, expected_logits, model, randomised
from measure import assert_close
from mpt_cases import CASES, LENGTHS, mpt_model
from tiny_families import CLASSES, GENERATING, fields, model_inputs, monoblock_model, with_images
from torch import Tensor, nn

from monoblock import DynamicCache, StaticCache, native
from monoblock.backends.pytorch.generation import native_decoder
from monoblock.backends.pytorch.quantization import formats
from monoblock.backends.pytorch.quantization.modules import quantized_module
from monoblock.native import build

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no native kernels: {native.status()}")

ATOL = 1e-5  # fp32, up to 3 layers, values of 1 to 10: measured 6e-6
MPT = "MptForCausalLM"
DYNAMIC = "rope, dynamic"  # its cached keys depend on the length, which the library does not support
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 20,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
VARIED: dict[str, Any] = {**OPTIONS, "no_repeat_ngram_size": 2}  # small random models repeat themselves


def family(name: str) -> Any:
    return model(MPT) if name == MPT else monoblock_model(name, **fields(CLASSES[name]))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, tokens) of every step that the library ran."""
    runs: list[tuple[int, int]] = []
    run = native_decoder.Steps.run

    def watched(self: native_decoder.Steps, ids_bn: Tensor, **given: Any) -> Tensor | None:
        scores = run(self, ids_bn, **given)
        if scores is not None:
            runs.append((ids_bn.shape[0], ids_bn.shape[1]))
        return scores

    monkeypatch.setattr(native_decoder.Steps, "run", watched)
    return runs


@pytest.fixture
def by_modules(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Runs a function with native steps off."""

    def do(what: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(native_decoder, "of", lambda *_, **__: None)
            return what()

    return do


@torch.inference_mode()
def stepped(
    module: Any, ids: Tensor, mask: Tensor | None, sizes: tuple[int, ...], cache: Any = None
) -> Tensor:
    """Scores (batch, tokens, vocabulary) after every token but those of the first chunk, which the modules run."""
    cache = DynamicCache(config=module.spec) if cache is None else cache
    start = sizes[0]
    valid = None if mask is None else mask[:, :start]
    module(ids[:, :start], attention_mask=valid, past_key_values=cache, use_cache=True)
    steps = native_decoder.of(module, cache)
    assert steps is not None, native_decoder.obstacle(module)
    scores = []
    for size in sizes[1:]:
        stop = start + size
        valid = None if mask is None else mask[:, :stop] != 0
        scores.append(steps.run(ids[:, start:stop], valid_bm=valid))
        start = stop
    assert start == ids.shape[1]
    assert cache.get_seq_length() == start
    return torch.cat(scores, dim=1)


def check(module: Any, padding: str, sizes: tuple[int, ...], cache: Any = None, what: str = "fused") -> None:
    ids, mask = batch(padding, LENGTHS)
    wanted = expected_logits(module, expected(module, ids, mask))[:, sizes[0] :]
    late = None if mask is None else mask[:, sizes[0] :]
    assert_close(what, stepped(module, ids, mask, sizes, cache), wanted, ATOL, late)


# ---------------------------------------------------------------------------- the definition

ONES = (8, *[1] * 15)
CHUNKS = (8, 1, 3, 5, 1, 4, 1)


@pytest.mark.parametrize("case", [case for case in CASES if case != DYNAMIC])
def test_every_option(case: str) -> None:
    module = mpt_model(case)
    for padding, sizes in (("none", ONES), ("left", CHUNKS)):
        check(module, padding, sizes, what=f"fused, {case}")


@pytest.mark.parametrize("name", GENERATING)
def test_every_family(name: str) -> None:
    """With windows, grouped heads, learned positions and both placements of the norms."""
    module = family(name)
    ids, mask = model_inputs(name, "left")
    wanted = expected_logits(module, expected(module, ids, mask))[:, 8:]
    assert mask is not None
    for sizes in (ONES, CHUNKS):
        assert_close(f"fused, {name}", stepped(module, ids, mask, sizes), wanted, ATOL, mask[:, 8:])


def test_static_cache() -> None:
    for case in ("alibi_bias_max", "sliding window, rope"):
        check(mpt_model(case), "left", CHUNKS, StaticCache(max_cache_len=23))


@pytest.mark.parametrize("head_dim", [6, 16, 40, 64, 112])
def test_heads_of_every_width(head_dim: int) -> None:
    """Narrower than a vector, whole vectors, and with a rest."""
    module = model(MPT, {"rope": True, "alibi": True}, head_dim=head_dim)
    for std in (0.2, 0.05):
        check(randomised(module, std=std), "left", CHUNKS)


@pytest.mark.parametrize("level", list(build.levels()))
def test_every_instruction_set(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library, found, status = native.choose(level)
    if found != level:
        pytest.skip(f"this machine has no {level}: {status}")
    monkeypatch.setattr(native, "library", lambda: library)
    for case in ("all at once", "rope", "qk_ln", "activation {'name': 'gelu', 'approximate': 'tanh'}"):
        check(mpt_model(case), "left", CHUNKS)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [2, 3])
def test_several_threads_share_rows_heads_and_keys(count: int) -> None:
    """One key/value head and one row: then the keys are divided; with three threads, unevenly."""
    torch.set_num_threads(count)
    module = model(MPT, {"attn_type": "multiquery_attention", "alibi_bias_max": 4}, max_seq_len=512)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(PAD + 1, 89, (1, 420), generator=generator)
    wanted = expected_logits(module, expected(module, ids))[:, 410:]
    assert_close("fused, divided keys", stepped(module, ids, None, (410, 1, 4, 5)), wanted, ATOL)
    check(mpt_model("grouped"), "left", CHUNKS)


def test_bfloat16_is_closer_to_the_oracle_than_the_modules() -> None:
    """Both get the same rounded weights; the library rounds keys and values alone."""
    for case in ("alibi_bias_max", "rope", "mptglu", "all at once"):
        module = mpt_model(case).bfloat16()
        ids, mask = batch("left", LENGTHS)
        wanted = expected_logits(module.float(), expected(module, ids, mask))[:, 8:]
        module.bfloat16()
        late = mask[:, 8:].bool().numpy()
        ours = stepped(module, ids, mask, CHUNKS)
        assert ours.dtype == torch.float32
        with torch.inference_mode():
            plain = module(ids, attention_mask=mask).logits[:, 8:]
        off, their_off = (np.sqrt(np.square(x.double().numpy() - wanted)[late].mean()) for x in (ours, plain))
        assert off < 0.8 * their_off, f"{case}: {off:.2e} against {their_off:.2e}"


# ---------------------------------------------------------------------------- rows of q, k and v by head


def other_order(struct: Any) -> list[np.ndarray[Any, Any]]:
    """Give a model's structure its q, k and v in the other order; returns the memory that it now points to.

    0: q of all heads, then k, then v; 1: q, k and v of the first head, then of the next (`qkv_by_head`).
    """
    heads, dim = struct.heads, struct.head_dim
    assert struct.kv_heads == heads
    shape = (heads, 3, dim) if struct.qkv_by_head else (3, heads, dim)
    order = np.arange(3 * heads * dim).reshape(shape).swapaxes(0, 1).reshape(-1)
    kept = []

    def reordered(pointer: int | None, size: int) -> int | None:
        if pointer is None:
            return None
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * (len(order) * size)).from_address(pointer))
        kept.append(memory.reshape(len(order), size)[order])
        return kept[-1].ctypes.data

    for layer in range(struct.layers):
        matrix = struct.blocks[layer].qkv
        padded = -(-matrix.inputs // 128) * 128
        names = {form: name for name, form in native.FORMATS.items()}
        sizes = {
            "float32": 4 * matrix.inputs,
            "bfloat16": 2 * matrix.inputs,
            "int8": padded,
            "int4": padded // 2,
        }
        matrix.data = reordered(matrix.data, sizes[names[matrix.format]])
        matrix.bias = reordered(matrix.bias, 4 if names[matrix.bias_format] == "float32" else 2)
        for name in ("scale", "low"):
            setattr(matrix, name, reordered(getattr(matrix, name), padded // max(1, matrix.group) * 2))
    struct.qkv_by_head = 1 - struct.qkv_by_head
    return kept


@pytest.mark.parametrize("form", ["float32", "bfloat16", "8 bits", "4 bits"])
@pytest.mark.parametrize(
    "case", ["no bias, rope", "bias, ALiBi, clip and one norm over all heads", "norms by head"]
)
def test_rows_of_q_k_and_v_by_head(case: str, form: str, taken: Any) -> None:
    """Both orders of the rows give the same bits, in scores and in the cache."""
    modules: dict[str, Callable[[], Any]] = {
        "no bias, rope": lambda: model(MPT, {"rope": True}),
        "bias, ALiBi, clip and one norm over all heads": lambda: model(
            MPT, {"qk_ln": True, "alibi": True, "clip_qkv": 0.5}, no_bias=False
        ),
        "norms by head": lambda: family("FuyuForCausalLM"),  # and RoPE on some channels, and biases
    }
    module = modules[case]()
    if form == "bfloat16":
        module.bfloat16()
    elif form != "float32":
        with torch.no_grad():
            packed(module, int(form[0]))
    ids, mask = batch("left", LENGTHS)
    found = []
    kept: list[np.ndarray[Any, Any]] = []
    for _ in range(2):
        cache = DynamicCache(config=module.spec)
        scores = stepped(module, ids, mask, CHUNKS, cache)
        found.append((scores, [tensor.clone() for layer in cache for tensor in layer]))
        if not kept:
            steps = native_decoder.of(module, cache)
            assert steps is not None
            kept = other_order(steps.weights.struct)
    assert len(taken) == 2 * (len(CHUNKS) - 1)
    (scores, cached), (other_scores, other_cached) = found
    assert torch.equal(scores, other_scores)
    assert all(map(torch.equal, cached, other_cached))


# ---------------------------------------------------------------------------- generation


@pytest.mark.parametrize("name", [MPT, *GENERATING])
def test_greedy_tokens_equal_the_modules(name: str, taken: Any, by_modules: Any) -> None:
    module = family(name)
    ids, mask = model_inputs("MistralForCausalLM" if name == MPT else name, "left")

    def run() -> Any:
        return module.generate(ids, attention_mask=mask, **VARIED)

    ours = run()
    assert taken == [(3, 1)] * 19
    assert torch.equal(ours, by_modules(run))


CALLS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 4},
    "beams and copies": {"num_beams": 4, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "sampled": {"do_sample": True, "top_k": 20, "num_return_sequences": 3, "seed": 5},
    "lookup": {"prompt_lookup_num_tokens": 5},
    "suffix": {"speculation": "suffix"},
    "guided": {"guidance_scale": 1.5},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", [MPT, "MistralForCausalLM"])
def test_generation_strategies(call: str, name: str, taken: Any, by_modules: Any) -> None:
    module = family(name)
    ids = batch("none", (23,))[0].repeat(1, 1 + (call in ("lookup", "suffix")))

    def run() -> Any:
        return module.generate(
            ids, **{**(OPTIONS if call in ("lookup", "suffix") else VARIED), **CALLS[call]}
        )

    ours, plain = run(), by_modules(run)
    assert taken
    if call != "scores":
        assert torch.equal(ours, plain)
        return
    assert torch.equal(ours.sequences, plain.sequences)
    for one, other in zip(ours.scores + ours.logits, plain.scores + plain.logits, strict=True):
        # no_repeat_ngram_size made some of them -infinity.
        assert torch.equal(one.isinf(), other.isinf())
        assert_close("scores", one.nan_to_num(neginf=0), other.nan_to_num(neginf=0), 2 * ATOL)


def test_assistant_model(taken: Any, by_modules: Any) -> None:
    module, helper = model(MPT), model(MPT, seed=0, n_layers=1)
    ids = batch("none", (23,))[0]

    def run() -> Any:
        return module.generate(ids, assistant_model=helper, num_assistant_tokens=4, **OPTIONS)

    assert torch.equal(run(), by_modules(run))
    assert max(count for _, count in taken) > 1


def test_a_windowed_layer_drops_keys(taken: Any, monkeypatch: pytest.MonkeyPatch, by_modules: Any) -> None:
    monkeypatch.setattr(DynamicCache, "SLACK", 4)
    module = family("MistralForCausalLM")
    ids, mask = model_inputs("MistralForCausalLM", "left")

    def run() -> Any:
        options = {**VARIED, "max_new_tokens": 41, "return_dict_in_generate": True}
        return module.generate(ids, attention_mask=mask, **options)

    ours, plain = run(), by_modules(run)
    assert len(taken) == 40
    assert torch.equal(ours.sequences, plain.sequences)
    assert ours.past_key_values.dropped == plain.past_key_values.dropped != [0, 0, 0]
    for one, other in zip(ours.past_key_values, plain.past_key_values, strict=True):
        for a, b in zip(one, other, strict=True):
            assert_close("kept keys and values", a, b, ATOL)


def test_continued_and_cropped_cache(by_modules: Any) -> None:
    """A cache that came back from one call begins the next, cut to a shorter text."""
    module = model(MPT)
    ids = batch("none", (23,))[0]

    def run() -> Any:
        first = module.generate(ids, **VARIED, return_dict_in_generate=True)
        cache = first.past_key_values
        cache.crop(30)
        text = torch.cat((first.sequences[:, :30], ids[:, :4]), dim=1)
        return module.generate(text, past_key_values=cache, **{**VARIED, "max_new_tokens": 12})

    assert torch.equal(run(), by_modules(run))


def test_given_positions_and_types(taken: Any, by_modules: Any) -> None:
    for name, more in (
        ("GPTNeoForCausalLM", {"token_type_ids": torch.full((2, 9), 5)}),
        ("OpenAIGPTLMHeadModel", {"position_ids": torch.arange(3, 12)[None]}),
        ("MistralForCausalLM", {"position_ids": torch.arange(18).view(2, 9) * 2}),
    ):
        module = family(name)
        ids = batch("none", (9, 9))[0]
        del taken[:]

        def run(module: Any = module, ids: Tensor = ids, more: Any = more) -> Any:
            return module.generate(ids, **VARIED, **more)

        ours = run()
        assert len(taken) == 19
        assert torch.equal(ours, by_modules(run))


def test_images_in_the_prompt(taken: Any, by_modules: Any) -> None:
    module = family("FuyuForCausalLM")
    ids, mask, patches, indices = with_images((6, 3))

    def run() -> Any:
        images = {"image_patches": patches, "image_patches_indices": indices}
        return module.generate(ids, attention_mask=mask, **images, **VARIED)

    ours = run()
    assert len(taken) == 19
    assert torch.equal(ours, by_modules(run))


def packed(module: Any, bits: int) -> Any:
    """Quantises all matrices; returns a plain model with the dequantised weights."""
    plain = copy.deepcopy(module)
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.Linear | nn.Embedding):
            owner, _, last = name.rpartition(".")
            made_part = quantized_module(part, formats.pack(part.weight, bits, 64), torch.float32)
            setattr(module.get_submodule(owner), last, made_part)
            plain.get_submodule(name).weight.copy_(made_part.dequantize())
    return plain


# Integer dot products round inputs to 8 bits in blocks of 64, each by up to 1/254 of its block's largest: about 0.6%
# for each matrix, measured 2.7% after 9 of them. Elsewhere only the order of summation differs.
ROUNDED, EXACT = 5e-2, 1e-5


@pytest.mark.parametrize("level", ["base", "avx2", "avx512_vnni_bf16", "neon_dotprod"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tie", [True, False])
@torch.no_grad()
def test_packed_weights(level: str, bits: int, tie: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    library, found, status = native.choose(level)
    if found != level:
        pytest.skip(f"this machine has no {level}: {status}")
    monkeypatch.setattr(native, "library", lambda: library)
    grouped = {"kv_n_heads": 2, "attn_type": "grouped_query_attention"}
    module = model(MPT, grouped, no_bias=False, d_model=96, tie_word_embeddings=tie)
    plain = packed(module, bits)
    ids, mask = batch("left", LENGTHS)
    wanted = expected_logits(plain, expected(plain, ids, mask))[:, 8:]
    late = mask[:, 8:].bool().numpy()
    off = np.square(stepped(module, ids, mask, CHUNKS).numpy() - wanted)[late].mean()
    share = np.sqrt(off / np.square(wanted)[late].mean())
    assert share < (ROUNDED if level in native.INT8_DOT_PRODUCTS else EXACT)


# ---------------------------------------------------------------------------- standing back


def hooked(module: Any) -> None:
    module.at("mlp_add", 1).register_forward_hook(lambda *_: None)


def replaced(module: Any) -> None:
    module.at("mlp_add", 0).forward = module.at("mlp_add", 0).forward


def adapted(module: Any) -> None:
    class Adapter(nn.Linear):
        pass

    old = module.at("out", 0)
    module.at("attention", 0).out_proj = Adapter(old.in_features, old.out_features, bias=old.bias is not None)


def parametrised(module: Any) -> None:
    nn.utils.parametrizations.weight_norm(module.at("down", 0))


def transposed(module: Any) -> None:
    weight = module.at("out", 0).weight
    weight.data = weight.data.T.contiguous().T


def widened(module: Any) -> None:
    module.at("norm2", 0).double()


def eager(module: Any) -> None:
    module.set_attn_implementation("eager")


def embedding_normed(module: Any) -> None:
    module.get_input_embeddings().max_norm = 1e9


OBSTACLES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a hook": (hooked, "a forward hook on transformer.blocks.1.ffn"),
    "a forward": (replaced, "an overridden forward method on transformer.blocks.0.ffn"),
    "another layer": (adapted, "Adapter in transformer.blocks.0.attn.out_proj"),
    "a parametrisation": (parametrised, "ParametrizedLinear in transformer.blocks.0.ffn.down_proj"),
    "a transposed weight": (transposed, "attn.out_proj.weight is not contiguous"),
    "another attention": (eager, "attn_implementation='eager'"),
    "a normed embedding": (embedding_normed, "max_norm of the embedding"),
    "float64": (lambda module: module.double(), "dtype float64"),
    "float16": (lambda module: module.half(), "dtype float16"),
}


@pytest.mark.parametrize("what", OBSTACLES)
def test_obstacles_are_named(what: str, taken: Any) -> None:
    module = model(MPT)
    assert native_decoder.obstacle(module) is None
    change, reason = OBSTACLES[what]
    with torch.no_grad():
        change(module)
    assert reason in (native_decoder.obstacle(module) or "")
    module.generate(batch("none")[0], **OPTIONS)
    assert not taken


def test_mixed_dtypes_are_an_obstacle() -> None:
    module = model(MPT)
    widened(module)
    assert "norm_2.weight is torch.float64 in a model of torch.float32" in (
        native_decoder.obstacle(module) or ""
    )


def test_models_and_settings_as_obstacles(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "dynamic RoPE scaling" in (native_decoder.obstacle(mpt_model(DYNAMIC)) or "")
    assert "bidirectional" in (
        native_decoder.obstacle(monoblock_model("MPNetForMaskedLM", **fields("mpnet"))) or ""
    )
    module = model(MPT)
    own = type("Own", (type(module),), {})(module.config)
    assert "Own is a subclass, which may compute something else" in (native_decoder.obstacle(own) or "")
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in (native_decoder.obstacle(module) or "")
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert "hooks on all modules" in (native_decoder.obstacle(module) or "")
    handle.remove()
    monkeypatch.setattr(native, "library", lambda: None)
    assert "no native kernels" in (native_decoder.obstacle(module) or "")


def test_calls_by_the_modules(taken: Any) -> None:
    module, ids = model(MPT), batch("none")[0]
    for call in (
        {"use_cache": False},
        {"cache_implementation": "quantized"},
        {"return_dict_in_generate": True, "output_attentions": True},
        {"return_dict_in_generate": True, "output_hidden_states": True},
    ):
        module.generate(ids, **OPTIONS, **call)
        assert not taken, call


def test_caches_that_the_library_cannot_write() -> None:
    module = model(MPT)
    ids = batch("none")[0]
    token = ids[:, :1]
    with torch.no_grad():
        past = module(ids, use_cache=True).past_key_values
        halves = DynamicCache([(k.half(), v.half()) for k, v in past])
        other_rows = DynamicCache([(k[:2], v[:2]) for k, v in past])
        transposed = DynamicCache([(k.mT.contiguous().mT, v) for k, v in past])
        shorter = DynamicCache(list(past)[:1])
        for cache in (halves, other_rows, shorter, DynamicCache()):
            steps = native_decoder.of(module, cache)
            assert steps is not None
            before = cache.get_seq_length()
            assert steps.run(token) is None
            assert cache.get_seq_length() == before
        # Room for a token is made in new buffers, which the library can write.
        steps = native_decoder.of(module, transposed)
        assert steps is not None
        wanted = module(token, past_key_values=past, use_cache=True).logits
        assert_close("a transposed cache", steps.run(token), wanted, ATOL)


def test_invalid_shapes_are_left_to_the_modules() -> None:
    module = model(MPT)
    ids = batch("none")[0]
    with torch.no_grad():
        cache = module(ids, use_cache=True).past_key_values
    steps, token = native_decoder.of(module, cache), ids[:, :1]
    assert steps is not None
    for given in (
        {"valid_bm": torch.ones(3, 23, dtype=torch.bool)},
        {"valid_bm": torch.ones(1, 24, dtype=torch.bool)},
        {"valid_bm": torch.ones(3, 24, dtype=torch.int64)},
        {"positions_bn": torch.zeros(2, 1, dtype=torch.int64)},
        {"types_bn": torch.zeros(3, 2, dtype=torch.int64)},
    ):
        assert steps.run(token, **given) is None
    assert steps.run(token[:2]) is None  # a row of the cache is missing
    assert steps.run(token, valid_bm=torch.ones(3, 24, dtype=torch.bool)) is not None


def test_large_batches_run_by_the_modules(taken: Any) -> None:
    module = model(MPT)
    ids = batch("none", (9,) * 17)[0]
    module.generate(ids[:16], **OPTIONS)
    assert taken == [(16, 1)] * 19
    module.generate(ids, **OPTIONS)
    assert len(taken) == 19


def test_indices_outside_a_table() -> None:
    module = family("GPTNeoForCausalLM")
    ids = batch("none", (9,))[0]
    several = ids.repeat(2, 1)
    cache = DynamicCache(config=module.spec)
    with torch.no_grad():
        module(ids, past_key_values=cache, use_cache=True)
        steps = native_decoder.of(module, cache)
        assert steps is not None
        assert steps.run(torch.tensor([[89]])) is None
        assert steps.run(torch.tensor([[-1]])) is None
        assert steps.run(ids[:, :1], types_bn=torch.tensor([[89]])) is None
        assert steps.run(ids[:, :1], positions_bn=torch.tensor([[64]])) is None
        assert cache.get_seq_length() == 9
        assert steps.run(ids[:, :1], positions_bn=torch.tensor([[63]])) is not None
    with pytest.raises(
        ValueError, match=r"filled with the token 99, but the model.s vocabulary has the ids 0 to 88"
    ):
        module.generate(several, **{**OPTIONS, "pad_token_id": 99}, stopping_criteria=[_first_ends()])


def _first_ends() -> Any:
    class FirstEnds:
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> list[bool]:
            return [row == 0 for row in range(len(input_ids))]

    return FirstEnds()


# ---------------------------------------------------------------------------- weights that change


def test_changed_weights_take_effect(by_modules: Any) -> None:
    module = model(MPT)
    ids = batch("none")[0]

    def run() -> Any:
        return module.generate(ids, **VARIED)

    outputs = [run()]
    other = model(MPT, seed=1).state_dict()
    changes: list[Callable[[], Any]] = [
        lambda: module.at("up", 0).weight.mul_(-1.5),
        lambda: module.load_state_dict(other),
        lambda: module.load_state_dict({k: v * 0.7 for k, v in other.items()}, assign=True),
        lambda: module.bfloat16(),
        lambda: module.float(),
        lambda: setattr(module.at("norm1", 1).weight, "data", torch.linspace(-1, 1, 36)),
    ]
    for change in changes:
        with torch.no_grad():
            change()
        outputs.append(run())
        assert native_decoder.obstacle(module) is None
        if module.dtype == torch.float32:
            assert torch.equal(outputs[-1], by_modules(run))
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(outputs[:4]))


def test_copies_and_pickles_exclude_native_state() -> None:
    module = model(MPT)
    ids = batch("none")[0]
    before = module.state_dict().keys()
    ours = module.generate(ids, **VARIED)
    assert module.state_dict().keys() == before
    other = copy.deepcopy(module)
    with torch.no_grad():
        module.at("up", 0).weight.zero_()
    assert torch.equal(other.generate(ids, **VARIED), ours)
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    assert "Weights" not in file.getvalue().decode("latin-1")
    assert not any(isinstance(value, native_decoder.NativeWeights) for value in vars(other).values())
    again = pickle.loads(pickle.dumps(other.bare))
    assert torch.equal(again.get_input_embeddings().weight, other.get_input_embeddings().weight)
