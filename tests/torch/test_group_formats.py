"""Quantised matrices as other tools make them: groups of 16 to 128, scales in float32 or of two levels, 8 bits
with a low, 4 bits without, zero points."""

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
from monoblock.checkpoint.packed import ZEROS as ZERO_CODES
from monoblock.quantization import WeightOnlyConfig

torch.set_num_threads(1)

# Bits, group, what `low` has, the dtype of scales.
Form = tuple[int, int, str, str]
NONE, LOWS, ZEROS = "no low", "lows", "zero points"
FORMS: list[Form] = [
    *itertools.product((8, 4), GROUPS, (NONE, LOWS, ZEROS), ("F16", "F32")),
    *itertools.product((8, 4), TWO_LEVEL_GROUPS, (NONE, LOWS), (TWO_LEVEL,)),
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
    made = as_stored(scale, stored, SUPER_BLOCK // group)
    if low == ZEROS:  # every byte in 8 bits; in 4 bits up to 16, as in GPTQ's first format
        zeros = torch.randint(0, 256 if bits == 8 else 17, scale.shape, generator=random, dtype=torch.uint8)
        return QuantizedTensor(codes, made, zeros, bits, group, inputs)
    made_lows = as_stored(lows, stored, SUPER_BLOCK // group) if low == LOWS else None
    return QuantizedTensor(codes, made, made_lows, bits, group, inputs)


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
    bits, group, low, _ = form
    packed = random_matrix(3, 200, form)
    codes = packed.codes
    if bits == 4:
        runs = codes.unflatten(1, (-1, 64))
        codes = torch.cat((runs & 15, runs >> 4), -1).flatten(1)
    assert packed.scale is not None and (packed.low is not None) == (low != NONE)
    assert packed.zero_points == (low == ZEROS)
    scale = values_of(packed.scale, group).repeat_interleave(group, 1)
    if packed.low is None:
        expected = (codes.float() - (8 if bits == 4 else 128)) * scale
    elif low == ZEROS:
        expected = (codes.int() - packed.low.int().repeat_interleave(group, 1)) * scale
        assert torch.equal(packed.unpack(torch.float32), expected[:, :200])  # rounded once
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


@pytest.mark.parametrize("form", [form for form in FORMS if form[2] == ZEROS])
@torch.no_grad()
def test_rows_with_zero_points_have_the_same_bits_alone(level: str, form: Form) -> None:
    """And those of the format without a low where all zero points are its code of 0: integer sums are exact."""
    if level != "avx512_vnni_bf16":
        pytest.skip("other levels have another order of sums for many rows")
    for outputs, inputs in [(67, 515), (9, 130), (130, 64)]:
        packed = random_matrix(outputs, inputs, form)
        assert packed.low is not None
        x = torch.randn(47, inputs, generator=torch.Generator().manual_seed(2))
        alone = torch.cat([quantized_dense(row, packed, None) for row in x.split(1)])
        for rows in (2, 3, 4, 8, 11, 17, 20, 47):
            assert torch.equal(quantized_dense(x[:rows], packed, None), alone[:rows]), (outputs, inputs, rows)
        alike = packed._replace(low=torch.full_like(packed.low, ZERO_CODES[form[0]]))
        for rows in (1, 4, 47):
            expected = quantized_dense(x[:rows], alike._replace(low=None), None)
            assert torch.equal(quantized_dense(x[:rows], alike, None), expected), (outputs, inputs, rows)


@pytest.mark.parametrize("group", GROUPS)
def test_memory_of_zero_points(group: int) -> None:
    """Code, fp16 scale and a byte: 4.19 bits a weight in groups of 128."""
    packed = random_matrix(64, 1024, (4, group, ZEROS, "F16"))
    assert packed.nbytes * 8 / (64 * 1024) == 4 + (16 + 8) / group


def test_zero_points_stay_bytes_in_modules() -> None:
    """`.to(dtype)` leaves them alone, also where there is an odd number of groups."""
    packed = random_matrix(5, 128, (4, 128, ZEROS, "F16"))
    module = quantized_module(torch.nn.Linear(128, 5), packed, torch.float32).double()
    assert module.scale is not None and module.scale.dtype == torch.float16
    assert module.low is not None and torch.equal(module.low, packed.low)


def test_formats_that_do_not_exist() -> None:
    for codes, scales, two_level in ((384, 2, False), (128, 8, False), (384, 5, False), (384, 12, True)):
        with pytest.raises(ValueError, match="bytes of codes"):
            formats.form_of(codes, scales, 300, two_level)


@pytest.mark.parametrize(
    "form",
    [
        (4, 32, LOWS, "F16"),
        (4, 32, NONE, "F16"),
        (8, 16, LOWS, "F32"),
        (4, 32, LOWS, TWO_LEVEL),
        (4, 128, ZEROS, "F16"),
        (4, 16, ZEROS, "F32"),
        (8, 64, ZEROS, "F16"),
    ],
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
