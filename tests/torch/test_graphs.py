"""Decoding over a static step: what a GPU records is here recorded as a graph of PyTorch's operators and played again,
which like a CUDA graph runs no Python and reads and writes the same tensors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import batch, model, whole_graph
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

ATOL = 2e-5  # fp32, 2-3 layers, logits of the order of 10: sums in another order; measured 8e-6
NEW = 20  # tokens; longer than the windows, so that every ring comes round


def operators(run: Callable[[], torch.Tensor], device: torch.device) -> cuda_graphs.Replay:
    """Records what `run` does to the tensors that it finds, and plays it."""
    run()  # as on a GPU, the recording is not the first run
    recording = make_fx(run)()
    return lambda: recording()


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[cuda_graphs.CapturedStep]]:
    """Lets CPUs run steps, unrecorded, which takes less time; short texts outgrow theirs. Gives what was made."""
    recorded: list[cuda_graphs.CapturedStep] = []
    begin = cuda_graphs.CapturedStep.__init__

    def noted(self: Any, *given: Any) -> None:
        begin(self, *given)
        recorded.append(self)

    monkeypatch.setattr(cuda_graphs.CapturedStep, "__init__", noted)
    monkeypatch.setitem(cuda_graphs.CAPTURE, "cpu", lambda run, _: run)
    monkeypatch.setattr(cuda_graphs, "MIN_LENGTH", 32)
    monkeypatch.setattr(cuda_graphs, "ROOM", 1)
    monkeypatch.setattr(cuda_graphs, "ALIGN", 4)
    cuda_graphs._kept.clear()
    yield recorded
    recorded.clear()
    cuda_graphs._kept.clear()


@pytest.fixture
def really(recording: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are recorded, and the recording is played."""
    monkeypatch.setitem(cuda_graphs.CAPTURE, "cpu", operators)


def both(module: Any, ids: Any, mask: Any, monkeypatch: pytest.MonkeyPatch, **given: Any) -> tuple[Any, Any]:
    """The outputs of `generate` from recordings and without."""
    asked = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": -1,
        "return_dict_in_generate": True,
        "output_logits": True,
        **given,
    }
    played = module.generate(ids, attention_mask=mask, **asked)
    with monkeypatch.context() as patch:
        patch.delitem(cuda_graphs.CAPTURE, "cpu")
        plain = module.generate(ids, attention_mask=mask, **asked)
    return played, plain


def compare(played: Any, plain: Any) -> None:
    assert torch.equal(played.sequences, plain.sequences)
    assert_close("recorded steps", torch.stack(played.logits), torch.stack(plain.logits), ATOL)


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
    name: str, padding: str, recording: Any, really: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pair(name)[1]
    ids, mask = model_inputs(name, padding)
    played, plain = both(module, ids, mask, monkeypatch)
    compare(played, plain)
    same_cache(played.past_key_values, plain.past_key_values)
    assert [r.shape.length for r in recording] == [32, 64], "23 tokens and 19 more outgrow the first"
    windows = [window or 64 for window in module.spec.windows]
    assert [-(-w // 4) * 4 for w in windows] == list(recording[1].shape.slots), "rings come round"
    assert {r.shape.padded for r in recording} == {padding == "left"}


# Dynamic scaling changes the rotation of cached keys with the length, which a captured graph cannot.
PLAIN = {"rope, dynamic"}


@pytest.mark.parametrize("case", CASES)
def test_options(case: str, recording: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = batch("left", LENGTHS)
    compare(*both(mpt_model(case), ids, mask, monkeypatch, max_new_tokens=cuda_graphs.MIN_NEW_TOKENS))
    assert bool(recording) == (case not in PLAIN)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_other_kernels(implementation: str, recording: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = mpt_model("all at once" if implementation == "eager" else "sliding window, rope")
    module.set_attn_implementation("sdpa")
    ids, mask = batch("left", LENGTHS)
    reference = both(module, ids, mask, monkeypatch)[1]
    monkeypatch.setattr("monoblock.backends.pytorch.kernels.attention.attend_flex", None)
    if implementation == "flex_attention":  # its prompts would be compiled: one token is what is asked for
        ids, mask = ids[:, -1:], None
        reference = both(module, ids, mask, monkeypatch)[1]
    module.set_attn_implementation(implementation)
    compare(both(module, ids, mask, monkeypatch)[0], reference)
    assert recording


# Heads of a width that the kernel for pieces takes.
WIDE: dict[str, Callable[[], Any]] = {
    "mistral": lambda: monoblock_model("MistralForCausalLM", **fields("mistral", head_dim=12)),
    "mpt": lambda: model(head_dim=8),
    "fuyu": lambda: monoblock_model("FuyuForCausalLM", **fields("fuyu")),
}


@pytest.mark.parametrize("name", WIDE)
def test_with_the_gpus_attention(name: str, recording: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in pieces, read from the slots."""
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


def test_static_caches(recording: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A static cache keeps all tokens, also of windowed layers: no slot is used twice."""
    ids, mask = batch("left", LENGTHS)
    module = mpt_model("sliding window, rope")
    played, plain = both(module, ids, mask, monkeypatch, cache_implementation="static")
    compare(played, plain)
    assert type(played.past_key_values) is StaticCache
    same_cache(played.past_key_values, plain.past_key_values)
    assert all(set(r.shape.slots) == {r.shape.length} for r in recording)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_given_cache_holds_all_tokens_afterwards(
    kind: Any, recording: Any, really: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversation: the cache of one call goes into the next, and only its new tokens are read."""
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
    assert recording


def test_a_full_static_cache_says_so(recording: Any) -> None:
    cache = StaticCache(max_cache_len=15)
    with pytest.raises(ValueError, match="the static cache has room for 15 tokens"):
        model().generate(batch("none", (9,))[0], past_key_values=cache, max_new_tokens=NEW, eos_token_id=-1)
    assert recording
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
def test_strategies(given: dict[str, Any], recording: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams exchange rows; copies make rows of prompts; guidance decodes two texts at once."""
    ids, mask = batch("left", LENGTHS)
    played, plain = both(pair("MistralForCausalLM")[1], ids, mask, monkeypatch, output_logits=False, **given)
    assert torch.equal(played.sequences, plain.sequences)
    same_cache(played.past_key_values, plain.past_key_values)
    assert recording


def test_images_in_the_prompt(recording: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_families import with_images

    ids, mask, patches, indices = with_images((5, 2))
    images = {"image_patches": patches, "image_patches_indices": indices}
    compare(*both(pair("FuyuForCausalLM")[1], ids, mask, monkeypatch, **images))
    assert recording


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights(bits: int, recording: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed matrices are parts of this library: a recording reads their codes, and packing is seen as new weights.

    Products are PyTorch's: where the native ones round inputs to 8 bits, a difference in the last bit of an input may
    become one of a whole step.
    """
    monkeypatch.setattr(native, "_opened", lambda: (None, None, "off: a test"))
    module = monoblock_model("MistralForCausalLM", **fields("mistral"))
    ids, mask = batch("left", LENGTHS)
    compare(*both(module, ids, mask, monkeypatch))
    before = len(recording)
    quantize(module, WeightOnlyConfig(bits=bits, group_size=64))
    assert module.quantization_config is not None
    compare(*both(module, ids, mask, monkeypatch))
    assert len(recording) == 2 * before


def test_bf16(recording: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = mpt_model("grouped").to(torch.bfloat16)
    ids, mask = batch("left", LENGTHS)
    played, plain = both(module, ids, mask, monkeypatch)
    # The same kernels on the same numbers but for the order of sums: half a unit of 8 bits at logits up to 16.
    assert_close("bf16", played.logits[0], plain.logits[0], 0.07)
    assert {r.shape.dtype for r in recording} == {torch.bfloat16}


# ---------------------------------------------------------------------------- recordings


def test_recordings_are_kept_and_reused(recording: Any, really: None) -> None:
    module, (ids, _) = model(), batch("none", (9,))
    first = module.generate(ids, max_new_tokens=NEW, eos_token_id=-1)
    assert len(recording) == 1
    assert torch.equal(module.generate(ids, max_new_tokens=NEW, eos_token_id=-1), first)
    assert len(recording) == 1
    assert torch.equal(module.generate(ids.expand(2, -1), max_new_tokens=NEW, eos_token_id=-1)[1:], first)
    assert len(recording) == 2, "another batch"


def test_changed_weights_are_seen_and_replaced_ones_recorded_anew(
    recording: Any, really: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, (ids, _) = model(), batch("none", (9,))
    before = module.generate(ids, max_new_tokens=NEW, eos_token_id=-1)
    with torch.no_grad():
        module.at("final_norm").weight.mul_(-1)
    changed, plain = both(module, ids, None, monkeypatch)
    compare(changed, plain)
    assert not torch.equal(changed.sequences, before)
    assert len(recording) == 1, "in place: the recording reads them"
    module.at("final_norm").weight = torch.nn.Parameter(-module.at("final_norm").weight.detach())
    replaced, plain = both(module, ids, None, monkeypatch)
    compare(replaced, plain)
    assert torch.equal(replaced.sequences, before)
    assert len(recording) == 2
    assert len(cuda_graphs._kept[module]) == 1, "the one of the old weights is gone"


def test_recordings_go_with_their_model(recording: Any, really: None) -> None:
    module, (ids, _) = model(), batch("none", (9,))
    module.generate(ids, max_new_tokens=NEW, eos_token_id=-1)
    seen = weakref.ref(recording.pop())
    assert seen() is not None
    # The graph of operators that stands for a recording holds the weights, as a CUDA graph does not.
    whole = weakref.ref(module)
    del module
    gc.collect()
    assert whole() is None
    assert seen() is None


def test_release_and_the_limit(recording: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, (ids, _) = model(), batch("none", (9,))
    monkeypatch.setattr(cuda_graphs, "MAX_KEPT", 2)
    for rows in (1, 2, 3):
        module.generate(ids.expand(rows, -1), max_new_tokens=NEW, eos_token_id=-1)
    assert [r.shape.rows for r in cuda_graphs._kept[module]] == [2, 3]
    cuda_graphs.release(module)
    assert module not in cuda_graphs._kept


def test_a_recording_that_fails_leaves_the_plain_path(
    recording: Any, monkeypatch: pytest.MonkeyPatch, logs: pytest.LogCaptureFixture
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


def _own_forward(module: Any) -> None:
    module.forward = module.forward


REFUSED: dict[str, tuple[dict[str, Any], Callable[[Any], None] | None]] = {
    "hooks": ({}, _hooked),
    "a part of another package": ({}, _foreign),
    "a forward of its own": ({}, _own_forward),
    "a growing cache": ({"cache_implementation": "dynamic"}, None),
    "a quantised cache": ({"cache_implementation": "quantized"}, None),
    "no cache": ({"use_cache": False}, None),
    "hidden states": ({"output_hidden_states": True, "return_dict_in_generate": True}, None),
    "speculation": ({"prompt_lookup_num_tokens": 3}, None),
    "positions of the caller's": ({"position_ids": torch.arange(9)[None]}, None),
    "few tokens": ({"max_new_tokens": 3}, None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_left_to_the_plain_path(case: str, recording: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given, change = REFUSED[case]
    module, (ids, _) = mpt_model("rope"), batch("none", (9,))
    if change is not None:
        change(module)
    asked = {"max_new_tokens": NEW, "eos_token_id": -1, **given}
    played = module.generate(ids, **asked)
    assert not recording
    monkeypatch.delitem(cuda_graphs.CAPTURE, "cpu")
    plain = module.generate(ids, **asked)
    assert torch.equal(getattr(played, "sequences", played), getattr(plain, "sequences", plain))


def test_without_a_gpu_nothing_is_recorded() -> None:
    module = model()
    module.generate(batch("none", (9,))[0], max_new_tokens=NEW, eos_token_id=-1)
    assert module not in cuda_graphs._kept


# ---------------------------------------------------------------------------- fit for recording


def state_of(
    module: Any, *, rows: int = 2, place: int = 0, device: str = "cpu", length: int = 32
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
    state.position_1.fill_(place)
    state.positions_b1.fill_(place + state.offset)
    return state


FIT = {
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
    """Which table of attention kernels a step goes by; the GPU's with keys in pieces."""
    if request.param == "gpu":
        monkeypatch.setattr(attention_cuda, "DEVICES", ("cpu", "meta"))
        monkeypatch.setitem(attention_cuda.PARTIAL, "meta", attention_cuda.PARTIAL["cuda"])
        monkeypatch.setattr(attention_cuda, "FEWEST_KEYS", 16)


# Operators that read a number back, copy from the host, or whose result's shape depends on the data.
NOT_RECORDED = (
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


@pytest.mark.parametrize("name", FIT)
@torch.no_grad()  # under inference_mode, operators made of others are seen whole
def test_a_step_runs_the_same_operators_at_every_place(name: str, table: None) -> None:
    """With the same arguments: nothing is decided by what is in the tensors, and nothing is read back."""
    module = FIT[name]()
    logs = []
    for place in (0, 5, 31):
        state = state_of(module, place=place)
        state.ids_b1.fill_(place)
        state.valid_bl[0, :place] = False
        state.position_1.fill_(place)
        with Log() as log:
            static_step(module, state)
        logs.append(log.calls)
    assert logs[0] == logs[1] == logs[2]
    names = {name for name, *_ in logs[0]}
    assert not [op for op in names if any(bad in op for bad in NOT_RECORDED)]
    assert len(names) > 10


@torch.no_grad()
def test_the_log_sees_what_must_not_be_recorded() -> None:
    with Log() as log:
        torch.tensor([1.0, 2.0])
        torch.arange(3).sum().item()
        torch.ones(3).nonzero()
    names = " ".join(name for name, *_ in log.calls)
    assert all(bad in names for bad in ("lift_fresh", "_local_scalar_dense", "nonzero"))


@pytest.mark.parametrize("name", FIT)
@torch.inference_mode()
def test_a_step_needs_no_numbers(name: str, table: None) -> None:
    """On the meta device there are none: reading one, or a shape that depends on one, is an error."""
    module = FIT[name]().to("meta")
    scores = static_step(module, state_of(module, device="meta"))
    assert scores.shape == (2, module.spec.vocab)
    assert scores.is_meta


@whole_graph
@pytest.mark.parametrize("name", ["MistralForCausalLM", "mpt, all at once"])
def test_a_step_is_one_graph(name: str) -> None:
    """torch.compile finds no place where it would have to go back to Python."""
    module = FIT[name]()
    step = torch.compile(static_step, backend="eager", fullgraph=True)
    with torch.inference_mode():
        one, two = state_of(module, place=7), state_of(module, place=7)
        for _ in range(3):
            assert_close("compiled", step(module, one), static_step(module, two), ATOL)


def test_slots() -> None:
    """The newest place of each slot; what was never written is ahead of the token."""
    for slots in (4, 16):
        written: dict[int, int] = {}
        for place in range(11):
            written[place % slots] = place
            expected = [written.get(slot, place + 1) for slot in range(slots)]
            assert held_positions(torch.tensor([place]), slots).tolist() == expected
