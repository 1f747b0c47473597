"""Hidden states of several sequences without padding (packed_forward.py): every option and family against
tests/oracle.py, long sequences and quantised weights against the modules; a sequence's states do not depend on the
others; what the library refuses."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from helpers import expected
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import assert_close
from mpt_cases import CASES, mpt_model
from tiny_families import CLASSES, KIND, MODEL_TYPES, VOCAB, fields, model_inputs, monoblock_model
from torch import nn

from monoblock import native
from monoblock.backends.pytorch import input_rounding
from monoblock.backends.pytorch.input_rounding import Roundings, large_channels
from monoblock.backends.pytorch.packed_forward import obstacle, packed_states
from monoblock.backends.pytorch.quantization import formats
from monoblock.backends.pytorch.quantization.modules import QuantizedMatrix, quantized_module

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no native kernels: {native.status()}")

# Inputs of products and of attention are rounded to bfloat16 beside the weights: by up to 2^-9 each, as many times as
# there are matrices, of which a part cancels in each sum. Measured up to 0.009.
PAIRS = 0.02
ATOL = 1e-5  # float32, up to 3 layers, values of 1 to 10: measured 6e-6
LENGTHS = (23, 1, 9, 17)


def sequences(lengths: Any, seed: int = 0, vocab: int = VOCAB) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(10, vocab, length).tolist() for length in lengths]


@pytest.fixture(autouse=True)
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 runs in the library on every machine."""
    monkeypatch.setattr(native, "only_torch_has_amx", lambda: False)


@pytest.fixture
def kernels(level: str) -> str:
    """Each instruction set."""
    if level == "0":
        pytest.skip("without native kernels")
    return level


def split(states: torch.Tensor, ids: list[list[int]]) -> list[np.ndarray]:
    return [part.numpy() for part in states.split([len(row) for row in ids])]


def check(what: str, module: Any) -> None:
    """Each sequence's states are the oracle's for that sequence alone."""
    ids = sequences(LENGTHS)
    states = packed_states(module, ids)
    assert states is not None, obstacle(module)
    for row, found in zip(ids, split(states, ids), strict=True):
        assert_close(what, found[None], expected(module, np.array([row])).hidden, ATOL)


# ---------------------------------------------------------------------------- the definition


@pytest.mark.parametrize("case", [case for case in CASES if case != "rope, dynamic"])
def test_every_option(case: str) -> None:
    check(f"packed, {case}", mpt_model(case))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.usefixtures("kernels")
def test_every_class(name: str) -> None:
    """The bare model's states, of any class; in every instruction set."""
    check(f"packed, {name}", monoblock_model(name, **fields(CLASSES[name])))


def modules_states(module: Any, ids: list[list[int]]) -> list[np.ndarray]:
    """The states by the modules, one sequence at a time."""
    base = module.bare
    with torch.no_grad():
        return [base(input_ids=torch.tensor([row]))[0][0].float().numpy() for row in ids]


@pytest.mark.parametrize("name", ["MPNetModel", "MistralModel", "GPTNeoModel"])
def test_long_sequences(name: str) -> None:
    """Several blocks of queries and keys; more tokens than are computed together; rows that no tile divides."""
    longer = {"max_position_embeddings": 700}
    module = monoblock_model(name, **{**fields(MODEL_TYPES[name]), **longer})
    ids = sequences((613, 385, 2, 257, 600, 571, 192, 13))
    states = packed_states(module, ids)
    assert states is not None
    for found, wanted in zip(split(states, ids), modules_states(module, ids), strict=True):
        assert_close(f"packed, long, {name}", found, wanted, 2 * ATOL)  # two float32 computations


def test_deep_matrices(kernels: str) -> None:
    """More inputs than are packed at once, and outputs that panels do not divide."""
    module = monoblock_model("MPNetModel", **{**fields("mpnet"), "intermediate_size": 1611})
    ids = sequences((31, 7))
    states = packed_states(module, ids)
    assert states is not None
    for found, wanted in zip(split(states, ids), modules_states(module, ids), strict=True):
        # Sums of 1611 products: rounding errors grow with the square root of their number.
        assert_close(f"packed, deep, {kernels}", found, wanted, 4 * ATOL)


def test_token_types() -> None:
    """Added as embeddings, as OpenAI GPT has them."""
    module = monoblock_model("OpenAIGPTModel", **fields("openai-gpt"))
    ids, types = sequences((9, 4)), sequences((9, 4), seed=1)
    states = packed_states(module, ids, types)
    assert states is not None
    for row, kinds, found in zip(ids, types, split(states, ids), strict=True):
        wanted = expected(module, np.array([row]), token_types=np.array([kinds])).hidden
        assert_close("packed, token types", found[None], wanted, ATOL)


def test_padding_tokens_in_a_text() -> None:
    """MPNet gives them the position of padding, and does not count them."""
    module = monoblock_model("MPNetModel", **fields("mpnet"))
    ids = [[0, 30, 1, 31, 1, 2], [0, 40, 2]]
    states = packed_states(module, ids)
    assert states is not None
    for found, wanted in zip(split(states, ids), modules_states(module, ids), strict=True):
        assert_close("packed, padding tokens", found, wanted, ATOL)


# ---------------------------------------------------------------------------- padded batches

HEADS = [name for name in MODEL_TYPES if KIND[name] not in ("choice", "double")]


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_unpadded_batches(name: str) -> None:
    """The output of every head is that of `forward`, where there is no padding."""
    module = monoblock_model(name, **fields(MODEL_TYPES[name]))
    for padding in ("left", "right"):
        ids, mask = model_inputs(name, padding)
        wanted = module(ids, attention_mask=mask)
        found = module.forward_unpadded({"input_ids": ids, "attention_mask": mask})
        if padding == "left" and KIND[name] in ("first", "pooler"):
            assert found is None  # these heads read the first token, which is padding
            continue
        assert found is not None, obstacle(module)
        assert type(found) is type(wanted)
        assert found.keys() == {key for key in wanted if key != "past_key_values"}
        for key, value in found.items():
            where = mask if value.shape[:2] == ids.shape else None
            assert_close(f"unpadded, {name}", value, wanted[key], 2 * ATOL, where)


def test_which_batches_are_unpadded() -> None:
    module = monoblock_model("MPNetModel", **fields("mpnet"))
    ids = torch.tensor(sequences((5, 5)))
    assert module.forward_unpadded({"input_ids": ids}) is not None
    holes = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert module.forward_unpadded({"input_ids": ids, "attention_mask": holes}) is None
    nothing = torch.tensor([[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    assert module.forward_unpadded({"input_ids": ids, "attention_mask": nothing}) is None
    assert module.forward_unpadded({"input_ids": ids, "position_ids": ids}) is None
    assert module.forward_unpadded({"attention_mask": nothing}) is None
    module.config.output_hidden_states = True
    assert module.forward_unpadded({"input_ids": ids}) is None


# ---------------------------------------------------------------------------- formats of weights


def quantized(module: Any, bits: int) -> Any:
    """The model with its linear layers in that many bits."""
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.Linear) and "lm_head" not in name:
            owner, _, leaf = name.rpartition(".")
            made_part = quantized_module(part, formats.pack(part.weight, bits, 64), torch.float32)
            setattr(module.get_submodule(owner), leaf, made_part)
    return module


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("name", ["MPNetModel", "MistralModel"])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights(kernels: str, name: str, bits: int) -> None:
    """The product with the same rounded weights. Where inputs are 8-bit integers too, each is off by up to 1/254 of the
    largest of its group: about 0.6% for each matrix, measured 2.7% after 9 of them. With AMX, inputs and weights are
    rounded to bfloat16."""
    module = quantized(monoblock_model(name, **fields(MODEL_TYPES[name])), bits)
    plain = monoblock_model(name, **fields(MODEL_TYPES[name]))
    for path, part in module.named_modules():
        if hasattr(part, "quantized"):
            plain.get_submodule(path).weight.data = part.dequantize()
    ids = sequences(LENGTHS)
    states = packed_states(module, ids)
    assert states is not None, obstacle(module)
    # With AVX2 inputs are rounded to 16 bits, by up to 2^-16 of the largest of their group: a 256th of that of 8 bits.
    bound = {"base": 1e-5, "avx2": 2e-4, "avx512": 2e-4, "avx512_amx": PAIRS}.get(kernels, 5e-2)
    for found, wanted in zip(split(states, ids), modules_states(plain, ids), strict=True):
        assert relative(found, wanted) < bound, (kernels, bits)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_rows_at_every_place_of_a_register_tile(kernels: str, bits: int) -> None:
    """A tile has up to six rows. Each number of rows is a function of its own; all of them must fuse the same sums."""
    sizes = {"hidden_size": 512, "num_attention_heads": 4, "intermediate_size": 512, "num_hidden_layers": 1}
    module = quantized(monoblock_model("MPNetModel", **{**fields("mpnet"), **sizes}), bits)
    for length in (1, 5, 7, 17):
        (ids,) = sequences([length])
        alone, twice = packed_states(module, [ids]), packed_states(module, [ids, ids])
        assert alone is not None and twice is not None, obstacle(module)
        assert np.array_equal(np.concatenate([alone, alone]), twice.numpy()), (kernels, length)


@pytest.mark.parametrize("name", ["MPNetModel", "MptModel"])
def test_bfloat16_weights(kernels: str, name: str) -> None:
    """The same as the rounded weights in float32, where inputs are not rounded to bfloat16 too (2^-9 each)."""
    kind = MODEL_TYPES[name]
    module = monoblock_model(name, **fields(kind)).to(torch.bfloat16)
    plain = monoblock_model(name, **fields(kind)).to(torch.bfloat16).float()
    ids = sequences(LENGTHS)
    states = packed_states(module, ids)
    assert states is not None
    bound = PAIRS if kernels in native.BF16_DOT_PRODUCTS else 1e-5
    for found, wanted in zip(split(states, ids), modules_states(plain, ids), strict=True):
        assert relative(found, wanted) < bound, kernels


# ---------------------------------------------------------------------------- inputs in 8 bits

LARGE = (5, 77, 200)  # channels


def encoder_with_large_channels() -> tuple[Any, Any]:
    """An encoder in 8 bits whose norms make three channels 40 times as large as the others, with an MLP whose
    activations are mostly of one sign; and the same with the dequantised weights."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 384, "num_hidden_layers": 2}
    plain = monoblock_model("MPNetModel", **{**fields("mpnet"), **sizes})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, part in plain.named_modules():
            if isinstance(part, nn.LayerNorm):
                part.weight[list(LARGE)] = 40.0
            elif isinstance(part, nn.Linear):
                part.weight.normal_(std=part.in_features**-0.5, generator=generator)
                if part.in_features == 256 and not name.endswith("attn.o"):  # inputs are those of a norm
                    part.weight[:, list(LARGE)] /= 40.0
                if "intermediate" in name:
                    part.weight *= 3
    module = quantized(copy.deepcopy(plain), 8)
    for path, part in module.named_modules():
        if hasattr(part, "quantized"):
            plain.get_submodule(path).weight.data = part.dequantize()
    return module, plain


def usual_channels_error(module: Any, plain: Any) -> float:
    """The relative error of the channels that are not large."""
    ids = sequences(LENGTHS)
    states = packed_states(module, ids)
    assert states is not None, obstacle(module)
    usual = [channel for channel in range(states.shape[1]) if channel not in LARGE]
    return relative(states.numpy()[:, usual], np.concatenate(modules_states(plain, ids))[:, usual])


def test_large_channels_do_not_make_the_others_coarse(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of 128 inputs whose largest is 40 times a usual one, which is at 3 of its deviations, has a 40 / 3 times
    coarser step. The error falls by at least 10 without such channels in the groups, and by 1.4 if activations
    are rounded about the middle of their range: half a step, in one of the four products."""
    if kernels != "avx512_vnni_bf16":
        pytest.skip("inputs are not rounded to 8 bits")
    error = usual_channels_error(*encoder_with_large_channels())
    with monkeypatch.context() as patch:
        patch.setattr(Roundings, "set", without_middle(Roundings.set))
        lopsided = usual_channels_error(*encoder_with_large_channels())
    monkeypatch.setattr(input_rounding, "wanted", lambda model: False)
    coarse = usual_channels_error(*encoder_with_large_channels())
    assert 10 * error < coarse, (error, coarse)
    assert 1.4 * error < lopsided, (error, lopsided)


def without_middle(method: Any) -> Any:
    def changed(self: Any, layer: Any, product: str, modules: Any, peaks: Any, one_sign: bool) -> None:
        method(self, layer, product, modules, peaks, False)

    return changed


def test_which_channels_are_large() -> None:
    """The largest of a group, two that are so together, none where others are as large; at most four."""
    peaks = torch.ones(384)
    peaks[[3, 7, 130]] = torch.tensor([50.0, 40.0, 45.0])
    assert large_channels(peaks, 128).tolist() == [3, 7, 130]
    assert large_channels(torch.linspace(1, 1.5, 384), 128).tolist() == []
    assert large_channels(peaks.repeat(2), 128).tolist() == [130, 387, 391, 514]  # of six, the best four
    assert len(large_channels(torch.arange(8).exp2() ** 2, 16)) == 4


def test_large_channels_alone_and_in_a_batch(kernels: str) -> None:
    """The same bits, whatever the rows of a register tile and of a thread's share."""
    module, _ = encoder_with_large_channels()
    ids = sequences((1, 5, 6, 31, 64, 17, 60, 53), seed=3)
    together = packed_states(module, ids)
    assert together is not None, obstacle(module)
    for row, found in zip(ids, split(together, ids), strict=True):
        alone = packed_states(module, [row])
        assert alone is not None
        assert np.array_equal(alone.numpy(), found), (kernels, len(row))


def test_modified_weights_are_used(kernels: str) -> None:
    """Also those that were copied for the large channels: with 8 bits, negated codes are negated weights."""
    (module, _), (fresh, _) = encoder_with_large_channels(), encoder_with_large_channels()
    ids = sequences(LENGTHS)
    before = packed_states(module, ids)
    for model in (module, fresh):
        for part in model.modules():
            if isinstance(part, QuantizedMatrix):
                part.codes.copy_(256 - part.codes.int())  # none is 0
    after, wanted = packed_states(module, ids), packed_states(fresh, ids)
    assert before is not None and after is not None and wanted is not None, (kernels, obstacle(module))
    assert not torch.equal(before, after)
    assert torch.equal(after, wanted)


# Heads with a multiple of 32 channels, for which the pass by AMX tiles is written.
WIDE: dict[str, dict[str, Any]] = {
    "MPNetModel": {"hidden_size": 64, "num_attention_heads": 2},
    "MistralModel": {"head_dim": 32},
    "FuyuForCausalLM": {"hidden_size": 64, "num_attention_heads": 2},
    "GPTNeoModel": {"hidden_size": 64, "num_heads": 2},
    "OpenAIGPTModel": {"n_embd": 64, "n_head": 2},
    "MptModel": {"d_model": 64, "n_heads": 2},
}


def check_rounded(what: str, module: Any, ids: list[list[int]]) -> None:
    """As `test_bfloat16_weights`."""
    states = packed_states(module.to(torch.bfloat16), ids)
    assert states is not None, obstacle(module)
    for row, found, wanted in zip(ids, split(states, ids), modules_states(module.float(), ids), strict=True):
        assert relative(found, wanted) < PAIRS, (what, len(row), relative(found, wanted))


@pytest.mark.parametrize(
    "case", [case for case in CASES if case not in ("rope, dynamic", "head_dim, odd width")]
)
def test_every_option_in_bfloat16(case: str) -> None:
    check_rounded(case, mpt_model(case, head_dim=32), sequences(LENGTHS))


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.usefixtures("kernels")
def test_every_family_in_bfloat16(name: str) -> None:
    """Short and long: several tiles of queries and keys, more tokens than are computed together, every offset in a
    block of 16 tokens."""
    wide = {**fields(MODEL_TYPES[name]), **WIDE[name]}
    key = {"MptModel": "max_seq_len", "OpenAIGPTModel": "n_positions"}.get(name, "max_position_embeddings")
    for more, lengths in ({}, range(1, 60)), ({key: 700}, (613, 385, 130, 257, 2, 129)):
        module = monoblock_model(name, **{**wide, **more})
        # GPT Neo does not divide scores by sqrt(head_dim): they would be so large that their rounding decides.
        if name == "GPTNeoModel":
            for layer in module.h:
                layer.attn.attention.q_proj.weight.data /= 32**0.5
        check_rounded(name, module, sequences(lengths))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_non_finite_states_stay_in_their_sequence(kernels: str, bits: int, wide: bool) -> None:
    """NaN in one token's embedding reaches all tokens of its sequence, through quantised weights too, and no other."""
    sizes = WIDE["MPNetModel"] if wide else {}
    module = quantized(monoblock_model("MPNetModel", **{**fields("mpnet"), **sizes}), bits)
    with torch.no_grad():
        module.get_input_embeddings().weight[7, 3] = float("nan")
    ids = [[30, 31, 32], [30, 7, 32], [33]]
    states = packed_states(module, ids)
    assert states is not None
    found = [part.isfinite() for part in states.split([3, 3, 1])]
    assert found[0].all(), kernels
    assert not found[1].any(), kernels
    assert found[2].all(), kernels


# ---------------------------------------------------------------------------- independence

MODELS: dict[str, Any] = {}


def kept(name: str, kind: str) -> Any:
    """A model that several examples share."""
    key = f"{name} {kind}"
    if key not in MODELS:
        module = monoblock_model(name, **{**fields(MODEL_TYPES[name]), **WIDE[name]})
        MODELS[key] = quantized(module, 8) if kind == "int8" else module.to(getattr(torch, kind))
    return MODELS[key]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["MPNetModel", "GPTNeoModel", "MistralModel"])
@given(lengths=st.lists(st.integers(1, 60), min_size=2, max_size=12), threads=st.integers(1, 3))
@settings(max_examples=12, deadline=None)
def test_a_sequence_does_not_depend_on_the_others(
    name: str, kind: str, lengths: list[int], threads: int
) -> None:
    """To the bit: alone or with others, in any order, on any number of threads."""
    module, ids = kept(name, kind), sequences(lengths)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = packed_states(module, ids)
        reversed_order = packed_states(module, ids[::-1])
        torch.set_num_threads(1)
        alone = [packed_states(module, [row]) for row in ids]
    finally:
        torch.set_num_threads(before)
    assert together is not None
    assert reversed_order is not None
    for i, (found, own) in enumerate(zip(split(together, ids), alone, strict=True)):
        assert own is not None
        assert np.array_equal(found, own.numpy())
        assert np.array_equal(found, split(reversed_order, ids[::-1])[len(ids) - 1 - i])


@pytest.mark.usefixtures("kernels")
def test_calls_share_nothing() -> None:
    """A larger call leaves nothing behind that a smaller one reads."""
    module = kept("MPNetModel", "float32")
    ids = sequences((5, 3))
    first = packed_states(module, ids)
    packed_states(kept("MistralModel", "float32"), sequences((60,) * 50))
    again = packed_states(module, ids)
    assert first is not None
    assert again is not None
    assert torch.equal(first, again)


# ---------------------------------------------------------------------------- at the door


def test_what_is_refused() -> None:
    module = monoblock_model("MPNetModel", **fields("mpnet"))
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        packed_states(module, [[3], []])
    with pytest.raises(ValueError, match=f"the vocabulary has the ids 0 to {VOCAB - 1}"):
        packed_states(module, [[VOCAB]])
    with pytest.raises(ValueError, match="64 learned positions, but a sequence has 65 tokens"):
        packed_states(module, [[3] * 65])
    with pytest.raises(ValueError, match="expected one for each token id"):
        packed_states(module, [[3, 4]], [[3]])
    none = packed_states(module, [])
    assert none is not None
    assert none.shape == (0, module.spec.width)


def test_obstacles(monkeypatch: pytest.MonkeyPatch) -> None:
    module = monoblock_model("MPNetModel", **fields("mpnet"))
    assert obstacle(module) is None
    assert obstacle(module.train()) == "training mode"
    module.eval()
    handle = module.encoder.layer[1].register_forward_hook(lambda *_: None)
    assert "a forward hook on encoder.layer.1" in (obstacle(module) or "")
    assert packed_states(module, [[3]]) is None
    handle.remove()
    module.set_attn_implementation("eager")
    assert "attn_implementation='eager'" in (obstacle(module) or "")
    assert obstacle(mpt_model("rope, dynamic")) == "dynamic RoPE scaling"
    assert obstacle(monoblock_model("MPNetModel", **fields("mpnet")).to("meta")) == "device meta"
    monkeypatch.setattr(native, "only_torch_has_amx", lambda: True)
    plain = monoblock_model("MPNetModel", **fields("mpnet"))
    assert obstacle(plain) is None
    assert "AMX" in (obstacle(plain.to(torch.bfloat16)) or "")


def test_changed_weights_are_used() -> None:
    """In place, replaced, or reloaded: also the table of relative biases."""
    module = monoblock_model("MPNetModel", **fields("mpnet"))
    ids = sequences((7,))
    packed_states(module, ids)
    with torch.no_grad():
        module.encoder.relative_attention_bias.weight.add_(0.5 * torch.randn(32, 6))
        module.encoder.layer[0].output.dense.weight.data = module.encoder.layer[0].output.dense.weight * 2
    states = packed_states(module, ids)
    assert states is not None
    assert_close("packed, changed", states.numpy(), modules_states(module, ids)[0], ATOL)
