"""Lossless bfloat16 in 12 bits: the format, products at every kernel level, models, files, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import monoblock
from monoblock import AutoModelForCausalLM, DynamicCache, native
from monoblock.backends.pytorch.generation import native_decoder
from monoblock.backends.pytorch.kernels import linear
from monoblock.backends.pytorch.kernels.linear import quantized_dense, quantized_linear
from monoblock.backends.pytorch.quantization import bf12, formats
from monoblock.backends.pytorch.quantization.modules import QuantizedMatrix

torch.set_num_threads(1)

# Inputs of whole runs of 128, of more than one unit of head (2,048), and neither; all long enough to save something.
SHAPES = [(9, 256), (33, 515), (6, 2304), (1, 4101)]
# Sums of floats in another order: a share of the sum of all sizes. Measured up to 2.1e-6.
CLOSE = 5e-6
HALF_STEP = 2.0**-8  # one rounding to bfloat16


def matrix(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    """Normal values, and special ones: zeros of both signs, denormals, very large."""
    made = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)).bfloat16()
    made[0, :9] = torch.tensor([0.0, -0.0, 1e-40, -9e-41, 1e-30, -3e-9, 1e20, -1e5, 0.0])
    made[outputs // 2, -3:] = torch.tensor([3e4, 1e-12, -1e-38])
    made[-1, 17] = 2.0**-24
    return made


def same(one: Tensor, other: Tensor) -> bool:
    """To the bit: -0 is not 0."""
    return one.dtype == other.dtype == torch.bfloat16 and torch.equal(
        one.view(torch.int16), other.view(torch.int16)
    )


def by_hand(codes: np.ndarray[Any, Any], inputs: int) -> np.ndarray[Any, Any]:
    """A row's weights one by one, as the format says, as the bits of bfloat16."""
    head = codes[: 32 * -(-inputs // 2048)].view(np.uint16)
    runs = codes[head.nbytes :].reshape(-1, 192)
    found = np.zeros(inputs, np.uint16)
    for i in range(inputs):
        run, at = divmod(i, 128)
        rest = int(runs[run, at])
        lower = int(runs[run, 128:].view(np.uint16)[at % 32]) >> 4 * (at // 32) & 15
        exponent = 0 if lower == 15 else int(head[0]) - lower
        found[i] = (rest & 0x80) << 8 | exponent << 7 | rest & 0x7F
    for i in range(head[1]):
        found[head[2 + 2 * i]] = head[3 + 2 * i]
    return found


# ---------------------------------------------------------------------------- the format


@pytest.mark.parametrize("shape", SHAPES)
def test_format_and_round_trip(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(*shape)
    packed = formats.pack(weight, 12, 128)
    assert {n: tuple(t.shape) for n, t in packed.tensors().items()} == formats.shapes(12, 128, *shape)
    assert packed.codes.dtype == torch.uint8 and packed.codes.shape[1] < 2 * shape[1]
    found = np.stack([by_hand(row, shape[1]) for row in packed.codes.numpy()])
    np.testing.assert_array_equal(found, weight.view(torch.int16).numpy().view(np.uint16))
    assert same(bf12.unpack(packed.codes, shape[1]), weight)
    # Rows do not depend on each other, and floats that are bfloat16 numbers are as good.
    monkeypatch.setattr(formats, "_CHUNK", 700)
    assert torch.equal(formats.pack(weight.float(), 12, 128).codes, packed.codes)


def test_size() -> None:
    """At 2,048 inputs a row's 3,072 bytes and its head of 32, of 4,096."""
    packed = formats.pack(torch.randn(4, 2048).bfloat16(), 12, 128)
    assert packed.codes.shape == (4, 3104) and packed.scale is packed.low is None


def test_incompressible_rows_raise() -> None:
    wide = torch.logspace(-30, 30, 512).repeat(3, 1).bfloat16()  # 200 exponents in a row
    for weight in (wide, torch.randn(3, 64).bfloat16()):
        with pytest.raises(formats.DoesNotFit, match="12 bits save nothing"):
            formats.pack(weight, 12, 128)


def test_only_bfloat16_values_are_packed() -> None:
    with pytest.raises(ValueError, match=r"float32 that bfloat16 cannot represent.*dtype=torch\.bfloat16"):
        formats.pack(torch.randn(3, 512), 12, 128)


# ---------------------------------------------------------------------------- products


@torch.no_grad()
def test_products(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the plain matrix, few rows and many (in blocks), in both types, with and without a bias."""
    torch.manual_seed(0)
    monkeypatch.setattr(linear, "BLOCK", 2500)
    for outputs, inputs in SHAPES:
        weight = matrix(outputs, inputs)
        weight[0, 6] = 7.0  # 1e20 would hide all others
        packed = formats.pack(weight, 12, 128)
        bias = torch.randn(outputs) if outputs % 2 else None
        for rows, dtype in [(r, torch.float32) for r in (1, 2, 3, 4, 5, 8, 16, 17)] + [(3, torch.bfloat16)]:
            x = torch.randn(rows, inputs).to(dtype)
            own = None if bias is None else bias.to(dtype)
            y = quantized_dense(x, packed, own)
            expected = F.linear(x.double(), weight.double(), None if own is None else own.double())
            sizes = x.double().abs() @ weight.double().abs().T + (0 if own is None else own.double().abs())
            allowed = CLOSE * sizes
            if (
                dtype == torch.bfloat16
            ):  # PyTorch's own way rounds the product, and rounds again with the bias
                allowed += 2 * HALF_STEP * (expected.abs() + (0 if own is None else own.double().abs()))
            if level in native.BF16_DOT_PRODUCTS and 1 < rows <= linear.FEW:
                allowed = allowed + HALF_STEP * sizes  # inputs are rounded to bfloat16
            assert ((y - expected).abs() <= allowed).all(), (outputs, inputs, rows, dtype)


def test_several_threads_unpack_the_whole_matrix() -> None:
    if (library := native.library()) is None:
        pytest.skip(f"native kernels: {native.status()}")
    torch.set_num_threads(2)
    try:
        for outputs, inputs in SHAPES:
            weight = matrix(outputs, inputs)
            assert same(linear._bfloat16(library, formats.pack(weight, 12, 128)), weight)
    finally:
        torch.set_num_threads(1)


def test_the_operator_and_its_gradients() -> None:
    weight = torch.randn(7, 256).bfloat16()
    packed = formats.pack(weight, 12, 128)
    x, bias = torch.randn(5, 256, requires_grad=True), torch.randn(7, requires_grad=True)
    torch.library.opcheck(quantized_linear, (x, *packed[:3], bias, *packed[3:]))
    y, upstream = quantized_dense(x, packed, bias), torch.randn(5, 7)
    found = torch.autograd.grad(y, (x, bias), upstream)
    torch.testing.assert_close(found, (upstream @ weight.float(), upstream.sum(0)), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------- models

SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "MptForCausalLM": ("MptConfig", {"d_model": 256, "n_heads": 4, "n_layers": 2, "vocab_size": 300}),
    "MistralForCausalLM": (
        "MistralConfig",
        {"hidden_size": 256, "intermediate_size": 520, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "vocab_size": 300},
    ),
    "OpenAIGPTLMHeadModel": (
        "OpenAIGPTConfig",
        {"n_embd": 256, "n_head": 4, "n_layer": 2, "vocab_size": 300},
    ),
    "MPNetForMaskedLM": (
        "MPNetConfig",
        {"hidden_size": 256, "intermediate_size": 520, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"vocab_size": 300},
    ),
}
IDS = torch.arange(5, 45).view(2, 20)


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    config, sizes = SIZES[name]
    return getattr(monoblock, name)(getattr(monoblock, config)(**sizes)).to(torch.bfloat16).eval()


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_models_are_bitwise_unchanged(name: str, tmp_path: Path) -> None:
    """The same answers to the bit for more tokens than the kernels take at once; the same weights when unpacked."""
    model = model_of(name)
    plain, state = model(IDS).logits, {k: v.clone() for k, v in model.hub_state_dict().items()}
    model.save_pretrained(tmp_path / "plain")
    loaded = getattr(monoblock, name).from_pretrained(tmp_path / "plain", quantization_config="lossless")
    inner = [m for m in loaded.modules() if isinstance(m, QuantizedMatrix)]
    assert len(inner) >= 8 and {m.bits for m in inner} == {12}
    assert loaded.get_memory_footprint() < 0.87 * model.get_memory_footprint()
    assert torch.equal(loaded(IDS).logits, plain)

    loaded.save_pretrained(tmp_path / "packed")
    again = getattr(monoblock, name).from_pretrained(tmp_path / "packed")
    assert again.quantization_config == loaded.quantization_config
    assert torch.equal(again(IDS).logits, plain)
    assert torch.equal(model.quantize("lossless")(IDS).logits, plain)
    for numbers in (again.dequantize().hub_state_dict(), model.dequantize().hub_state_dict()):
        assert numbers.keys() == state.keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in numbers.items())


@pytest.mark.parametrize("name", ["MptForCausalLM", "MistralForCausalLM"])
@torch.inference_mode()
def test_native_steps(name: str, level: str) -> None:
    """A step over a cache, whose first token also reads the packed embedding, by the kernels and by the modules."""
    if level == "0":
        pytest.skip("there are no steps without kernels")
    model = model_of(name).quantize("lossless").float()
    cache, other = DynamicCache(config=model.spec), DynamicCache(config=model.spec)
    for each in (cache, other):
        model(IDS[:, :15], past_key_values=each, use_cache=True)
    steps = native_decoder.of(model, cache)
    assert steps is not None, native_decoder.obstacle(model)
    found = steps.run(IDS[:, 15:17])
    expected = model(IDS[:, 15:17], past_key_values=other, use_cache=True).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # fp32, sums in another order


def test_matrices_that_do_not_fit_stay_as_they_are(tmp_path: Path) -> None:
    model = model_of("MistralForCausalLM")
    odd = model.at("down", 1)
    with torch.no_grad():
        odd.weight.copy_(torch.logspace(-30, 30, odd.in_features).expand_as(odd.weight))
    kept = odd.weight.clone()
    model.quantize("lossless").save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    for each in (model, again):
        assert isinstance(each.at("down", 0), QuantizedMatrix)
        assert torch.equal(each.at("down", 1).weight, kept)


@torch.no_grad()
def test_damaged_codes_stay_in_bounds(level: str) -> None:
    """A file may name any number of weights in any column: what is not there is passed over."""
    weight = (1 + torch.rand(3, 256)).bfloat16()  # one exponent: nothing is in the heads
    packed = formats.pack(weight, 12, 128)
    codes = packed.codes
    for damage in ((65535, 40000), (7, 65535), (1, 256)):
        head = codes[:, :32].contiguous().view(torch.int16)
        head[:, 1], head[:, 2::2] = (int(np.uint16(word).astype(np.int16)) for word in damage)
        damaged = torch.cat((head.view(torch.uint8), codes[:, 32:]), dim=1)
        assert same(bf12.unpack(damaged, 256), weight), level
        for rows in (1, 5, 20):
            x = torch.randn(rows, 256)
            y = quantized_dense(x, packed._replace(codes=damaged), None)
            # Inputs of 5 to 16 rows may be rounded to bfloat16.
            torch.testing.assert_close(y, x @ weight.float().T, rtol=1e-2, atol=0.5)


def test_invalid_models_raise(tmp_path: Path) -> None:
    model = model_of("MptForCausalLM").float()
    with torch.no_grad():
        model.at("up", 0).weight.add_(1e-6)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"ffn\.up_proj\.weight: .*bfloat16 cannot represent"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config="lossless")
    rounded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config="lossless", dtype=torch.bfloat16
    )
    assert rounded.at("up", 0).bits == 12
    with pytest.raises(ValueError, match="group_size=64 is not for 12 bits"):
        monoblock.WeightOnlyConfig(bits=12, group_size=64)
