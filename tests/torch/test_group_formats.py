"""Quantised matrices as other tools make them: groups of 16 to 128, scales in float32 or of two levels, 8 bits
with a low, 4 bits without."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny_families import randomised
from torch import Tensor

import monoblock
from monoblock import native
from monoblock.backends.pytorch.kernels.linear import quantized_dense
from monoblock.backends.pytorch.packed_forward import packed_states
from monoblock.backends.pytorch.parts import replace
from monoblock.backends.pytorch.quantization import formats
from monoblock.backends.pytorch.quantization.formats import QuantizedTensor
from monoblock.backends.pytorch.quantization.modules import quantized_module
from monoblock.backends.pytorch.quantization.quantize import matrices
from monoblock.checkpoint.packed import GROUPS, SUPER_BLOCK, TWO_LEVEL, TWO_LEVEL_GROUPS
from monoblock.quantization import WeightOnlyConfig

torch.set_num_threads(1)

# Bits, group, low, the dtype of scales.
Form = tuple[int, int, bool, str]
FORMS: list[Form] = [
    *itertools.product((8, 4), GROUPS, (False, True), ("F16", "F32")),
    *itertools.product((8, 4), TWO_LEVEL_GROUPS, (False, True), (TWO_LEVEL,)),
]
# Activations in 8 bits, or none: measured up to 0.006 and 2e-7 of the product's norm.
BOUNDS = {True: 0.01, False: 1e-6}


def random_matrix(outputs: int, inputs: int, form: Form, seed: int = 0) -> QuantizedTensor:
    """Random codes in a format, with weights of a standard deviation of about 1 / sqrt(inputs)."""
    bits, group, low, stored = form
    random = torch.Generator().manual_seed(seed)
    padded = -(-inputs // 128) * 128
    codes = torch.randint(0, 256, (outputs, padded * bits // 8), generator=random, dtype=torch.uint8)
    steps = (1 << bits) / 3.5 * inputs**0.5  # the deviation of uniform codes is their number / 3.5
    scale = (0.5 + torch.rand(outputs, padded // group, generator=random)) / steps
    # Not in the middle of the codes, so that the sum of low times inputs counts.
    lows = -scale * (1 << bits) * (0.3 + 0.3 * torch.rand(scale.shape, generator=random))
    made = (as_stored(x, stored, SUPER_BLOCK // group) for x in (scale, lows))
    return QuantizedTensor(codes, next(made), next(made) if low else None, bits, group, inputs)


def as_stored(values: Tensor, stored: str, groups: int) -> Tensor:
    """Values (outputs, groups of a row) as scales are stored; `groups`: those of a super-block."""
    if stored != TWO_LEVEL:
        return values.to(formats.SCALES[stored])
    blocks = values.unflatten(1, (-1, groups))
    number = (blocks.abs().amax(-1) / 100).half()
    factors = (blocks / number.float()[..., None]).round().to(torch.int8).flatten(1)
    return torch.cat((factors.view(torch.uint8), number.view(torch.uint8)), dim=1)


def values_of(stored: Tensor, group: int) -> Tensor:
    """The values (outputs, groups of a row) again, by another way than the library's."""
    if stored.dtype != torch.uint8:
        return stored.float()
    each = SUPER_BLOCK // group
    blocks = stored.shape[1] // (each + 2)
    numbers = stored[:, blocks * each :].contiguous().view(torch.float16)
    return torch.stack(
        [stored[:, i].view(torch.int8).float() * numbers[:, i // each].float() for i in range(blocks * each)],
        1,
    )


@pytest.mark.parametrize("form", FORMS)
def test_weights(form: Form) -> None:
    bits, group, has_low, _ = form
    packed = random_matrix(3, 200, form)
    codes = packed.codes
    if bits == 4:
        runs = codes.unflatten(1, (-1, 64))
        codes = torch.cat((runs & 15, runs >> 4), -1).flatten(1)
    assert packed.scale is not None and (packed.low is not None) == has_low
    scale = values_of(packed.scale, group).repeat_interleave(group, 1)
    if packed.low is None:
        expected = (codes.float() - (8 if bits == 4 else 128)) * scale
    else:
        expected = codes * scale + values_of(packed.low, group).repeat_interleave(group, 1)
    torch.testing.assert_close(packed.unpack(torch.float32), expected[:, :200])
    again = QuantizedTensor.of(packed.tensors(), 200)
    assert again[3:] == packed[3:]


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_product(level: str, form: Form) -> None:
    """By the kernels for few rows and for many, on each instruction set, in float32 and bfloat16."""
    inputs, outputs = 728, 71  # 3 super-blocks
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
    for codes, scales, two_level in ((384, 2, False), (128, 8, False), (384, 5, False), (384, 12, True)):
        with pytest.raises(ValueError, match="bytes of codes"):
            formats.form_of(codes, scales, 300, two_level)


@pytest.mark.parametrize(
    "form", [(4, 32, True, "F16"), (4, 32, False, "F16"), (8, 16, True, "F32"), (4, 32, True, TWO_LEVEL)]
)
@torch.no_grad()
def test_models(level: str, form: Form) -> None:
    """The native step, prompts and documents without padding, against the dequantised model."""
    sizes = {"hidden_size": 144, "intermediate_size": 240, "num_hidden_layers": 2, "vocab_size": 99}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 36, "sliding_window": None}
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
