"""Decoding with a static step. Traced graphs of PyTorch's operators stand in for CUDA graphs: like them they run no
Python and read and write the same tensors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import batch, model, traced_by_213
from measure import assert_close
from mpt_cases import CASES, LENGTHS, mpt_model
from tiny_families import CLASSES as FAMILY_OF
from tiny_families import GENERATING, fields, model_inputs, monoblock_model, pair
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from monoblock import DynamicCache, StaticCache, WeightOnlyConfig, native
from monoblock.backends.pytorch.generation import cuda_graphs
from monoblock.backends.pytorch.generation.static_step import Shape, StepState, held_positions, static_step
from monoblock.backends.pytorch.kernels import attention_cuda
from monoblock.backends.pytorch.quantization.quantize import quantize

ATOL = 2e-5  # fp32, 2-3 layers, logits of about 10: a different order of summation; measured 8e-6
NEW = 20  # tokens; longer than the windows, so that every ring buffer wraps around


def operators(run: Callable[[], torch.Tensor], device: torch.device) -> cuda_graphs.Replay:
    """Captures what `run` does to existing tensors, and replays it."""
    run()  # as on a GPU, the captured run is not the first
    graph = make_fx(run)()
    return lambda: graph()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[cuda_graphs.CapturedStep]]:
    """Steps on the CPU without capture, which is faster, at short lengths; yields them as they are made."""
    captured: list[cuda_graphs.CapturedStep] = []
    begin = cuda_graphs.CapturedStep.__init__

    def stored(self: Any, *given: Any) -> None:
        begin(self, *given)
        captured.append(self)

    monkeypatch.setattr(cuda_graphs.CapturedStep, "__init__", stored)
    monkeypatch.setitem(cuda_graphs.CAPTURE, "cpu", lambda run, _: run)
    monkeypatch.setattr(cuda_graphs, "MIN_LENGTH", 32)
    monkeypatch.setattr(cuda_graphs, "ROOM", 1)
    monkeypatch.setattr(cuda_graphs, "ALIGN", 4)
    cuda_graphs._kept.clear()
    yield captured
    captured.clear()
    cuda_graphs._kept.clear()


@pytest.fixture
def capturing(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are captured, and the graph is replayed."""
    monkeypatch.setitem(cuda_graphs.CAPTURE, "cpu", operators)


def both(module: Any, ids: Any, mask: Any, monkeypatch: pytest.MonkeyPatch, **given: Any) -> tuple[Any, Any]:
    """The outputs of `generate` with captured graphs and without."""
    options = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": -1,
        "return_dict_in_generate": True,
        "output_logits": True,
        **given,
    }
    replayed = module.generate(ids, attention_mask=mask, **options)
    with monkeypatch.context() as patch:
        patch.delitem(cuda_graphs.CAPTURE, "cpu")
        plain = module.generate(ids, attention_mask=mask, **options)
    return replayed, plain


def compare(replayed: Any, plain: Any) -> None:
    assert torch.equal(replayed.sequences, plain.sequences)
    assert_close("replayed steps", torch.stack(replayed.logits), torch.stack(plain.logits), ATOL)


def same_cache(one: Any, other: Any) -> None:
    """The last tokens, as many as both hold, in every layer."""
    assert one.get_seq_length() == other.get_seq_length()
    for mine, theirs in zip(one, other, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            n = min(a.shape[2], b.shape[2])
            assert n
            assert_close("cache", a[:, :, -n:], b[:, :, -n:], ATOL)


# ---------------------------------------------------------------------------- equal to the plain path


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", GENERATING)
def test_families(
    name: str, padding: str, graphs: Any, capturing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pair(name)[1]
    ids, mask = model_inputs(name, padding)
    replayed, plain = both(module, ids, mask, monkeypatch)
    compare(replayed, plain)
    same_cache(replayed.past_key_values, plain.past_key_values)
    assert [r.shape.length for r in graphs] == [32, 64], "23 tokens and 19 more outgrow the first"
    windows = [window or 64 for window in module.spec.windows]
    assert [-(-w // 4) * 4 for w in windows] == list(graphs[1].shape.slots), "ring buffers wrap around"
    assert {r.shape.padded for r in graphs} == {padding == "left"}


# Dynamic scaling changes old keys as the sequence grows, which a captured graph cannot.
PLAIN = {"rope, dynamic"}


@pytest.mark.parametrize("case", CASES)
def test_options(case: str, graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = batch("left", LENGTHS)
    compare(*both(mpt_model(case), ids, mask, monkeypatch, max_new_tokens=cuda_graphs.MIN_NEW_TOKENS))
    assert bool(graphs) == (case not in PLAIN)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_other_kernels(implementation: str, graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = mpt_model("all at once" if implementation == "eager" else "sliding window, rope")
    module.set_attn_implementation("sdpa")
    ids, mask = batch("left", LENGTHS)
    reference = both(module, ids, mask, monkeypatch)[1]
    monkeypatch.setattr("monoblock.backends.pytorch.kernels.attention.attend_flex", None)
    if implementation == "flex_attention":  # its prompts would be compiled: one token suffices
        ids, mask = ids[:, -1:], None
        reference = both(module, ids, mask, monkeypatch)[1]
    module.set_attn_implementation(implementation)
    compare(both(module, ids, mask, monkeypatch)[0], reference)
    assert graphs


# Heads of a width that the kernel of split keys supports.
WIDE: dict[str, Callable[[], Any]] = {
    "mistral": lambda: monoblock_model("MistralForCausalLM", **fields("mistral", head_dim=12)),
    "mpt": lambda: model(head_dim=8),
    "fuyu": lambda: monoblock_model("FuyuForCausalLM", **fields("fuyu")),
}


@pytest.mark.parametrize("name", WIDE)
def test_with_the_gpu_attention(name: str, graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split keys, read from the slots."""
    monkeypatch.setattr(attention_cuda, "FEWEST_KEYS", 16)
    module = WIDE[name]()
    ids, mask = batch("left", LENGTHS)
    plain = both(module, ids, mask, monkeypatch)[1]
    cuda_graphs.release(module)
    monkeypatch.setattr(cuda_graphs, "ALIGN", 64)
    monkeypatch.setattr(attention_cuda, "DEVICES", ("cpu",))
    parts: list[int] = []
    partial = attention_cuda.PARTIAL["cpu"]
    monkeypatch.setitem(attention_cuda.PARTIAL, "cpu", lambda *given: (parts.append(1), partial(*given))[1])
    monkeypatch.setattr(cuda_graphs, "MIN_LENGTH", 64)
    compare(both(module, ids, mask, monkeypatch)[0], plain)
    assert parts


def test_static_caches(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A static cache keeps all tokens, also of windowed layers: no slot is used twice."""
    ids, mask = batch("left", LENGTHS)
    module = mpt_model("sliding window, rope")
    replayed, plain = both(module, ids, mask, monkeypatch, cache_implementation="static")
    compare(replayed, plain)
    assert type(replayed.past_key_values) is StaticCache
    same_cache(replayed.past_key_values, plain.past_key_values)
    assert all(set(r.shape.slots) == {r.shape.length} for r in graphs)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_given_cache_holds_all_tokens_afterwards(
    kind: Any, graphs: Any, capturing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversation: the cache of one call is given to the next, which reads only new tokens."""
    module = pair("MistralForCausalLM")[1]
    ids, _ = batch("none", (9,))
    caches = []
    for cpu in (True, False):
        with monkeypatch.context() as patch:
            if not cpu:
                patch.delitem(cuda_graphs.CAPTURE, "cpu")
            cache = (
                StaticCache(max_cache_len=60) if kind is StaticCache else DynamicCache(config=module.config)
            )
            out = module.generate(ids, past_key_values=cache, max_new_tokens=NEW, eos_token_id=-1)
            assert cache.get_seq_length() == out.shape[1] - 1
            more = torch.cat((out, ids), dim=1)
            out = module.generate(more, past_key_values=cache, max_new_tokens=NEW, eos_token_id=-1)
            caches.append((cache, out))
    same_cache(caches[0][0], caches[1][0])
    assert torch.equal(caches[0][1], caches[1][1])
    assert graphs


def test_a_full_static_cache_raises(graphs: Any) -> None:
    cache = StaticCache(max_cache_len=15)
    with pytest.raises(ValueError, match="the static cache has room for 15 tokens"):
        model().generate(batch("none", (9,))[0], past_key_values=cache, max_new_tokens=NEW, eos_token_id=-1)
    assert graphs
    assert cache.get_seq_length() == 15


@pytest.mark.parametrize(
    "given",
    [
        {"num_beams": 3},
        {"num_beams": 3, "cache_implementation": "static"},
        {"do_sample": True, "seed": 3, "num_return_sequences": 2},
        {"guidance_scale": 1.7},
    ],
    ids=str,
)
def test_strategies(given: dict[str, Any], graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams reorder rows; copies expand prompts; guidance decodes two sequences."""
    ids, mask = batch("left", LENGTHS)
    replayed, plain = both(
        pair("MistralForCausalLM")[1], ids, mask, monkeypatch, output_logits=False, **given
    )
    assert torch.equal(replayed.sequences, plain.sequences)
    same_cache(replayed.past_key_values, plain.past_key_values)
    assert graphs


def test_images_in_the_prompt(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_families import with_images

    ids, mask, patches, indices = with_images((5, 2))
    images = {"image_patches": patches, "image_patches_indices": indices}
    compare(*both(pair("FuyuForCausalLM")[1], ids, mask, monkeypatch, **images))
    assert graphs


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights(bits: int, graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured graphs read the codes of quantised matrices, and quantising replaces weights.

    Products are PyTorch's: where the native ones round inputs to 8 bits, a difference in the last bit of an input may
    become one of a whole step.
    """
    monkeypatch.setattr(native, "_opened", lambda: (None, None, "off: a test"))
    module = monoblock_model("MistralForCausalLM", **fields("mistral"))
    ids, mask = batch("left", LENGTHS)
    compare(*both(module, ids, mask, monkeypatch))
    before = len(graphs)
    quantize(module, WeightOnlyConfig(bits=bits, group_size=64))
    assert module.quantization_config is not None
    compare(*both(module, ids, mask, monkeypatch))
    assert len(graphs) == 2 * before


def test_bf16(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = mpt_model("grouped").to(torch.bfloat16)
    ids, mask = batch("left", LENGTHS)
    replayed, plain = both(module, ids, mask, monkeypatch)
    # The same kernels on the same numbers but for the order of sums: half a unit of 8 bits at logits up to 16.
    assert_close("bf16", replayed.logits[0], plain.logits[0], 0.07)
    assert {r.shape.dtype for r in graphs} == {torch.bfloat16}


# ---------------------------------------------------------------------------- captured graphs


def test_graphs_are_kept_and_reused(graphs: Any, capturing: None) -> None:
    module, (ids, _) = model(), batch("none", (9,))
    first = module.generate(ids, max_new_tokens=NEW, eos_token_id=-1)
    assert len(graphs) == 1
    assert torch.equal(module.generate(ids, max_new_tokens=NEW, eos_token_id=-1), first)
    assert len(graphs) == 1
    assert torch.equal(module.generate(ids.expand(2, -1), max_new_tokens=NEW, eos_token_id=-1)[1:], first)
    assert len(graphs) == 2, "another batch"


def test_in_place_changes_are_read_and_replaced_weights_recaptured(
    graphs: Any, capturing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, (ids, _) = model(), batch("none", (9,))
    before = module.generate(ids, max_new_tokens=NEW, eos_token_id=-1)
    with torch.no_grad():
        module.at("final_norm").weight.mul_(-1)
    changed, plain = both(module, ids, None, monkeypatch)
    compare(changed, plain)
    assert not torch.equal(changed.sequences, before)
    assert len(graphs) == 1, "in place: the graph reads them"
    module.at("final_norm").weight = torch.nn.Parameter(-module.at("final_norm").weight.detach())
    replaced, plain = both(module, ids, None, monkeypatch)
    compare(replaced, plain)
    assert torch.equal(replaced.sequences, before)
    assert len(graphs) == 2
    assert len(cuda_graphs._kept[module]) == 1, "the graph of the old weights is freed"


def test_graphs_are_freed_with_their_model(graphs: Any, capturing: None) -> None:
    module, (ids, _) = model(), batch("none", (9,))
    module.generate(ids, max_new_tokens=NEW, eos_token_id=-1)
    graph = weakref.ref(graphs.pop())
    assert graph() is not None
    # The graph of operators that stands in holds the weights, as a CUDA graph does not.
    whole = weakref.ref(module)
    del module
    gc.collect()
    assert whole() is None
    assert graph() is None


def test_release_and_the_limit(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, (ids, _) = model(), batch("none", (9,))
    monkeypatch.setattr(cuda_graphs, "MAX_KEPT", 2)
    for rows in (1, 2, 3):
        module.generate(ids.expand(rows, -1), max_new_tokens=NEW, eos_token_id=-1)
    assert [r.shape.rows for r in cuda_graphs._kept[module]] == [2, 3]
    cuda_graphs.release(module)
    assert module not in cuda_graphs._kept


def test_failed_capture_falls_back(
    graphs: Any, monkeypatch: pytest.MonkeyPatch, logs: pytest.LogCaptureFixture
) -> None:
    def fails(run: Any, device: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    module, (ids, _) = model(), batch("none", (9,))
    expected = module.generate(ids, max_new_tokens=NEW, eos_token_id=-1)
    cuda_graphs.release(module)
    monkeypatch.setitem(cuda_graphs.CAPTURE, "cpu", fails)
    assert torch.equal(module.generate(ids, max_new_tokens=NEW, eos_token_id=-1), expected)
    assert sum("continues without CUDA graphs" in message for message in logs.messages) == 1


def _hooked(module: Any) -> None:
    module.at("mlp_add", 1).register_forward_hook(lambda *_: None)


def _foreign(module: Any) -> None:
    class Mine(torch.nn.Linear):
        pass

    module.at("down", 0).__class__ = Mine


def _overridden_forward(module: Any) -> None:
    module.forward = module.forward


UNSUPPORTED: dict[str, tuple[dict[str, Any], Callable[[Any], None] | None]] = {
    "hooks": ({}, _hooked),
    "a module of another package": ({}, _foreign),
    "an overridden forward": ({}, _overridden_forward),
    "a growing cache": ({"cache_implementation": "dynamic"}, None),
    "a quantised cache": ({"cache_implementation": "quantized"}, None),
    "no cache": ({"use_cache": False}, None),
    "hidden states": ({"output_hidden_states": True, "return_dict_in_generate": True}, None),
    "speculation": ({"prompt_lookup_num_tokens": 3}, None),
    "positions of the caller's": ({"position_ids": torch.arange(9)[None]}, None),
    "few tokens": ({"max_new_tokens": 3}, None),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_cases_without_graphs(case: str, graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given, change = UNSUPPORTED[case]
    module, (ids, _) = mpt_model("rope"), batch("none", (9,))
    if change is not None:
        change(module)
    options = {"max_new_tokens": NEW, "eos_token_id": -1, **given}
    replayed = module.generate(ids, **options)
    assert not graphs
    monkeypatch.delitem(cuda_graphs.CAPTURE, "cpu")
    plain = module.generate(ids, **options)
    assert torch.equal(getattr(replayed, "sequences", replayed), getattr(plain, "sequences", plain))


def test_without_a_gpu_nothing_is_captured() -> None:
    module = model()
    module.generate(batch("none", (9,))[0], max_new_tokens=NEW, eos_token_id=-1)
    assert module not in cuda_graphs._kept


# ---------------------------------------------------------------------------- suitability for capture


def state_of(
    module: Any, *, rows: int = 2, position: int = 0, device: str = "cpu", length: int = 32
) -> StepState:
    spec = module.spec
    slots = tuple(length if window is None else min(length, 16) for window in spec.windows)
    shape = Shape(
        rows=rows,
        length=length,
        slots=slots,
        padded=True,
        dtype=module.dtype,
        device=torch.device(device),
    )
    state = StepState(spec, shape)
    state.position_1.fill_(position)
    state.positions_b1.fill_(position + state.offset)
    return state


CAPTURABLE = {
    **{name: lambda name=name: monoblock_model(name, **fields(FAMILY_OF[name])) for name in GENERATING},
    **WIDE,
    "mpt, all at once": lambda: mpt_model("all at once"),
    "mpt, rope": lambda: mpt_model("rope, llama3"),
}


class Log(TorchDispatchMode):
    """The operators that run, with the shapes of their tensors and all other arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        out = func(*args, **(kwargs or {}))

        def shown(x: Any) -> Any:
            if isinstance(x, torch.Tensor):
                return tuple(x.shape), x.stride(), x.dtype
            return tuple(map(shown, x)) if isinstance(x, list | tuple) else x

        self.calls.append((str(func), shown(args), shown(tuple((kwargs or {}).items())), shown(out)))
        return out


@pytest.fixture(params=["cpu", "gpu"])
def table(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which table of attention kernels a step goes by; the GPU's with split keys."""
    if request.param == "gpu":
        monkeypatch.setattr(attention_cuda, "DEVICES", ("cpu", "meta"))
        monkeypatch.setitem(attention_cuda.PARTIAL, "meta", attention_cuda.PARTIAL["cuda"])
        monkeypatch.setattr(attention_cuda, "FEWEST_KEYS", 16)


# Operators that read a number back, copy from the host, or whose result's shape depends on the data.
NOT_CAPTURABLE = (
    "_local_scalar_dense",
    "nonzero",
    "lift_fresh",
    "masked_select",
    "unique",
    "is_nonzero",
    "equal.default",
    "allclose",
    "repeat_interleave.Tensor",
    "_to_copy_device",
    "bincount",
    "histc",
    "pin_memory",
)


@pytest.mark.parametrize("name", CAPTURABLE)
@torch.no_grad()  # under inference_mode, composite operators are not decomposed
def test_a_step_runs_the_same_operators_at_every_position(name: str, table: None) -> None:
    """With the same arguments: nothing is decided by what is in the tensors, and nothing is read back."""
    module = CAPTURABLE[name]()
    logs = []
    for position in (0, 5, 31):
        state = state_of(module, position=position)
        state.ids_b1.fill_(position)
        state.valid_bl[0, :position] = False
        state.position_1.fill_(position)
        with Log() as log:
            static_step(module, state)
        logs.append(log.calls)
    assert logs[0] == logs[1] == logs[2]
    names = {name for name, *_ in logs[0]}
    assert not [op for op in names if any(bad in op for bad in NOT_CAPTURABLE)]
    assert len(names) > 10


@torch.no_grad()
def test_the_log_detects_operators_that_cannot_be_captured() -> None:
    with Log() as log:
        torch.tensor([1.0, 2.0])
        torch.arange(3).sum().item()
        torch.ones(3).nonzero()
    names = " ".join(name for name, *_ in log.calls)
    assert all(bad in names for bad in ("lift_fresh", "_local_scalar_dense", "nonzero"))


@pytest.mark.parametrize("name", CAPTURABLE)
@torch.inference_mode()
def test_a_step_on_the_meta_device(name: str, table: None) -> None:
    """On the meta device there are none: reading one, or a shape that depends on one, is an error."""
    module = CAPTURABLE[name]().to("meta")
    scores = static_step(module, state_of(module, device="meta"))
    assert scores.shape == (2, module.spec.vocab)
    assert scores.is_meta


@traced_by_213
@pytest.mark.parametrize("name", ["MistralForCausalLM", "mpt, all at once"])
def test_a_step_is_one_graph(name: str) -> None:
    """torch.compile finds no graph break."""
    module = CAPTURABLE[name]()
    step = torch.compile(static_step, backend="eager", fullgraph=True)
    with torch.inference_mode():
        one, two = state_of(module, position=7), state_of(module, position=7)
        for _ in range(3):
            assert_close("compiled", step(module, one), static_step(module, two), ATOL)


def test_slots() -> None:
    """The newest position of each slot; slots never written have a position after the token."""
    for slots in (4, 16):
        written: dict[int, int] = {}
        for position in range(11):
            written[position % slots] = position
            expected = [written.get(slot, position + 1) for slot in range(slots)]
            assert held_positions(torch.tensor([position]), slots).tolist() == expected
