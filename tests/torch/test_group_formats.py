"""Quantised matrices as other tools make them: groups of 16 to 128, scales in float32, 8 bits with a low."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from test_packing import by_hand
from tiny_families import randomised

import monoblock
from monoblock import native
from monoblock.backends.pytorch.kernels.linear import quantized_dense
from monoblock.backends.pytorch.packed_forward import packed_states
from monoblock.backends.pytorch.parts import replace
from monoblock.backends.pytorch.quantization import formats
from monoblock.backends.pytorch.quantization.formats import QuantizedTensor
from monoblock.backends.pytorch.quantization.modules import quantized_module
from monoblock.backends.pytorch.quantization.quantize import matrices
from monoblock.quantization import WeightOnlyConfig

torch.set_num_threads(1)

# Bits, group, low, float32 scales.
FORMS = [
    (bits, group, low, wide)
    for bits, group, low, wide in itertools.product((8, 4), formats.GROUPS, (False, True), (False, True))
    if low or bits == 8
]
# Activations in 8 bits, or none: measured up to 0.006 and 2e-7 of the product's norm.
BOUNDS = {True: 0.01, False: 1e-6}


def random_matrix(
    outputs: int, inputs: int, form: tuple[int, int, bool, bool], seed: int = 0
) -> QuantizedTensor:
    """Random codes in a format, with weights of a standard deviation of about 1 / sqrt(inputs)."""
    bits, group, low, wide = form
    random = torch.Generator().manual_seed(seed)
    padded = -(-inputs // 128) * 128
    codes = torch.randint(0, 256, (outputs, padded * bits // 8), generator=random, dtype=torch.uint8)
    steps = (1 << bits) / 3.5 * inputs**0.5  # the deviation of uniform codes is their number / 3.5
    dtype = torch.float32 if wide else torch.float16
    scale = (0.5 + torch.rand(outputs, padded // group, generator=random)) / steps
    # Not in the middle of the codes, so that the sum of low times inputs counts.
    lows = -scale * (1 << bits) * (0.3 + 0.3 * torch.rand(scale.shape, generator=random))
    return QuantizedTensor(codes, scale.to(dtype), lows.to(dtype) if low else None, bits, group, inputs)


@pytest.mark.parametrize("form", FORMS)
def test_weights(form: tuple[int, int, bool, bool]) -> None:
    packed = random_matrix(3, 200, form)
    found = packed.unpack(torch.float32)
    if form[0] == 4 or not form[2]:
        torch.testing.assert_close(found, torch.from_numpy(by_hand(packed)), rtol=1e-6, atol=1e-7)
    else:
        assert packed.scale is not None and packed.low is not None
        scale, low = (t.float().repeat_interleave(form[1], 1)[:, :200] for t in (packed.scale, packed.low))
        torch.testing.assert_close(found, packed.codes[:, :200] * scale + low)
    again = QuantizedTensor.of(packed.tensors(), 200)
    assert again[3:] == packed[3:]


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_product(level: str, form: tuple[int, int, bool, bool]) -> None:
    """By the kernels for few rows and for many, on each instruction set, in float32 and bfloat16."""
    inputs, outputs = 328, 71
    packed = random_matrix(outputs, inputs, form)
    weight = packed.unpack(torch.float32)
    for rows in (1, 3, 12, 40):
        x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))
        bias = torch.randn(outputs, generator=torch.Generator().manual_seed(9))
        expected, found = F.linear(x, weight, bias), quantized_dense(x, packed, bias)
        error = float((found - expected).norm() / expected.norm())
        assert error < BOUNDS[level in native.INT8_DOT_PRODUCTS], (rows, error)
        short = quantized_dense(x.bfloat16(), packed, bias)
        assert short.dtype == torch.bfloat16
        assert float((short.float() - expected).norm() / expected.norm()) < 0.015, rows


def test_formats_that_do_not_exist() -> None:
    for codes, scales in ((384, 2), (128, 8), (384, 5)):
        with pytest.raises(ValueError, match="bytes of codes"):
            formats.form_of(codes, scales, 300)


@pytest.mark.parametrize("form", [(4, 32, True, False), (8, 16, True, True), (8, 32, False, False)])
@torch.no_grad()
def test_models(level: str, form: tuple[int, int, bool, bool]) -> None:
    """The native step, prompts and documents without padding, against the dequantised model."""
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 99}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": None}
    model = randomised(monoblock.MistralForCausalLM(monoblock.MistralConfig(**sizes, **heads))).eval()
    for seed, (name, module) in enumerate(matrices(model).items()):
        packed = random_matrix(*module.get_parameter("weight").shape, form, seed)
        replace(model, name, quantized_module(module, packed, torch.float32))
    model.quantization_config = WeightOnlyConfig(bits=form[0], group_size=form[1], source="gguf")
    plain = copy.deepcopy(model).dequantize()
    ids = torch.randint(0, 99, (2, 21), generator=torch.Generator().manual_seed(0))
    bound = BOUNDS[level in native.INT8_DOT_PRODUCTS] * 8  # through the layers
    expected = plain(ids).logits
    assert float((model(ids).logits - expected).norm() / expected.norm()) < bound
    states = packed_states(model.model, ids.tolist())
    expected = plain.model(ids).last_hidden_state.flatten(0, 1)
    if level != "0":
        # Between those levels inputs are rounded to 16 bits: measured 8e-5.
        assert float((states - expected).norm() / expected.norm()) < max(bound, 3e-4)
    asked = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ids, **asked)
    if level != "0":
        assert model.decoding_path().startswith("native step"), model.decoding_path()
    forced = plain(out.sequences).logits[:, 20:-1]
    found = torch.stack(out.logits, 1)
    assert float((found - forced).norm() / forced.norm()) < bound
