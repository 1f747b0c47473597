"""Dense operators against float64, with every level of native kernels and without."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from ctypes import byref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monoblock import OpenAIGPTConfig, OpenAIGPTLMHeadModel, native
from monoblock.backends.pytorch.kernels import linear
from monoblock.backends.pytorch.kernels.linear import Linear, dense, quantized_dense
from monoblock.backends.pytorch.quantization import formats
from monoblock.native import tuning
from monoblock.quantization import LOSSLESS

# Outputs around the blocks of 2, 4, 8, 16 and 64; inputs around vectors, runs of 128, and panels of 64 groups.
SHAPES = [(1, 1), (7, 3), (9, 64), (17, 130), (67, 257), (33, 515)]
ROWS = [*range(1, 18), 23]

# Sums of floats in another order: a share of the sum of all sizes. Measured 3e-7 at 515 inputs.
CLOSE = 2e-6
HALF_STEP = 2.0**-8  # bfloat16 has 8 digits: one rounding is off by half of the last


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bound(x: Tensor, weight: Tensor, bias: Tensor | None, expected: Tensor, dtype: torch.dtype) -> Tensor:
    sizes = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    return CLOSE * sizes + (HALF_STEP * expected.abs() if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_plain_weights(level: str, dtype: torch.dtype) -> None:
    for outputs, inputs in SHAPES:
        weight = made(outputs, inputs, dtype=dtype)
        bias = made(outputs, dtype=dtype, seed=1) if outputs % 3 else None
        for rows in ROWS:
            x = made(rows, inputs + 5, dtype=dtype, seed=2)[:, :inputs]
            expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
            # Without the kernels PyTorch's own products do it, and may round more than once.
            factor = 2 if level == "0" else 1
            off = (dense(x, weight, bias) - expected).abs()
            assert (off <= factor * bound(x, weight, bias, expected, dtype)).all(), (outputs, inputs, rows)


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_quantised_weights(level: str, bits: int, group: int) -> None:
    for outputs, inputs in SHAPES:
        packed = formats.pack(made(outputs, inputs), bits, group)
        weight = packed.unpack(torch.float64)
        for rows, dtype in [(r, torch.float32) for r in ROWS] + [(3, torch.bfloat16), (40, torch.bfloat16)]:
            x, bias = made(rows, inputs, dtype=dtype, seed=2), made(outputs, dtype=dtype, seed=1)
            y = quantized_dense(x, packed, bias)
            expected = F.linear(x.double(), weight, bias.double())
            allowed = bound(x, weight, bias, expected, dtype)
            if native.has_int8_gemm():
                allowed += rounding_of_inputs(x, weight, group)
            by_torch = level == "0" or (rows > linear.FEW and not native.has_int8_gemm())
            if by_torch and dtype == torch.bfloat16:
                # PyTorch's own way rounds the weights to bfloat16, and the product before the bias comes to it.
                allowed += 2 * HALF_STEP * (x.double().abs() @ weight.abs().T + bias.double().abs())
            assert ((y - expected).abs() <= allowed).all(), (outputs, inputs, rows, dtype)


@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_quantised_rows_have_the_same_bits_alone(level: str, bits: int, group: int) -> None:
    """With VNNI tiles, panels of 128 inputs (up to 24 rows) and panels of all inputs add in one order."""
    if level != "avx512_vnni_bf16":
        pytest.skip("other levels have another order of sums for many rows")
    for outputs, inputs in [(67, 515), (9, 130), (130, 64)]:
        packed = formats.pack(made(outputs, inputs), bits, group)
        x = made(47, inputs, seed=2)
        alone = torch.cat([quantized_dense(row, packed, None) for row in x.split(1)])
        for rows in (2, 3, 4, 8, 11, 17, 20, 47):
            assert torch.equal(quantized_dense(x[:rows], packed, None), alone[:rows]), (outputs, inputs, rows)


def rounding_of_inputs(x: Tensor, weight: Tensor, group: int) -> Tensor:
    """Error bound of inputs rounded to integers: half a step each, 1/127 of the largest in the group."""
    pad = -x.shape[1] % group
    steps = F.pad(x.double(), (0, pad)).unflatten(1, (-1, group)).abs().amax(-1) / 127
    sizes = F.pad(weight.abs(), (0, pad)).unflatten(1, (-1, group)).sum(-1)
    return 0.5001 * steps @ sizes.T  # what is left over is the floats' own rounding


@torch.no_grad()
def test_many_inputs(level: str) -> None:
    """More groups than scales are made for at a time, for 4,097 inputs (33 runs) and for 9,000."""
    for inputs in (4097, 9000):
        weight, x = made(10, inputs), made(9, inputs, seed=1)
        packed = formats.pack(weight, 8, 64)
        y = quantized_dense(x, packed, None)
        expected = x.double() @ packed.unpack(torch.float64).T
        # Codes are up to 255, of which the middle, 128, goes again: sums are as much larger as what comes out of them.
        limit = 0.01 if native.has_int8_gemm() else 5e-6  # measured 6e-3 and 1.2e-6
        assert (y - expected).norm() < limit * expected.norm(), level


@torch.no_grad()
def test_nan_is_propagated(level: str) -> None:
    x = made(3, 200)
    x[1, 150] = float("nan")
    packed = formats.pack(made(5, 200), 4, 128)
    for rows in (3, 20):
        many = x.repeat(rows // 3 + 1, 1)[:rows]
        for y in (
            dense(many, made(5, 200), None),
            dense(many.bfloat16(), made(5, 200).bfloat16(), None),
            quantized_dense(many, packed, None),
        ):
            assert y[1].isnan().all() and not y[0].isnan().any(), (level, rows)


@torch.no_grad()
def test_threads_do_not_change_the_result(level: str) -> None:
    weight = made(700, 200, dtype=torch.bfloat16)
    packed = formats.pack(weight.float(), 4, 128)
    for rows in (1, 7, 33):
        x, found = made(rows, 200, dtype=torch.bfloat16), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = quantized_dense(x, packed, None)
            own = level != "0" and (rows < 17 or native.has_bf16_gemm(200))
            found.append((dense(x, weight, None) if own else y, y))
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@torch.no_grad()
def test_every_plan_of_reading_weights_gives_the_same_bits(level: str) -> None:
    if level == "0":
        pytest.skip("PyTorch's products have no plans")
    outputs, inputs = 100, 500
    weight, library = made(outputs, inputs), native.library()
    packed = {bits: formats.pack(weight, bits, 64) for bits in (8, 4)}
    matrices = [weight, weight.bfloat16(), *packed.values(), formats.pack(weight.bfloat16(), LOSSLESS, 128)]
    structures = [linear.native_matrix(matrix, None) for matrix in matrices]
    names = list(native.FORMATS)
    for rows in (1, 2, 3, 4, 5, 8, 9, 16):
        x = made(rows, inputs, seed=rows)

        def products(rows: int = rows, x: Tensor = x) -> list[Tensor]:
            found: list[Tensor] = []
            for structure in structures:
                y = torch.empty(rows, outputs)
                assert not library.mb_product(byref(structure), x.data_ptr(), rows, y.data_ptr(), 2)
                found.append(y)
            return found

        expected = products()
        assert (expected[0] - x @ weight.T).abs().max() <= CLOSE * (x.abs() @ weight.abs().T).max()
        before = {(name, own): tuning.get_plan(library, name, own) for name in names for own in tuning.ROWS}
        try:
            for fields in (fields for group in tuning.candidates(1) for fields in group):
                tuning.force(library, fields)
                for name, ours, theirs in zip(names, products(), expected, strict=True):
                    assert torch.equal(ours, theirs), (rows, fields, name)
        finally:
            for (name, own), plan in before.items():
                tuning.set_plan(library, name, own, plan)


@pytest.mark.skipif(native.library() is None, reason=f"native kernels: {native.status()}")
@torch.no_grad()
def test_products_that_pytorch_has_faster_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tuning.get_plan(native.library(), "float32", 1)
    measured = {("float32", 1): tuning.Choice(plan, 1.0, 0.8), ("float32", 4): tuning.Choice(plan, 1.0, 1.2)}
    monkeypatch.setattr(tuning, "_used", {torch.get_num_threads(): measured})
    weight = made(64, 64)
    assert linear.product(made(1, 64), weight, None) is not linear._native
    assert linear.product(made(4, 64), weight, None) is linear._native
    monkeypatch.setattr(tuning, "ensure", lambda *_: measured)
    sizes = {"n_embd": 32, "n_head": 2, "n_layer": 1, "vocab_size": 50}
    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes)).eval()
    assert model.decoding_path() == "PyTorch's products of float32 weights are 1.2 x as fast on this machine"
    measured["float32", 1] = tuning.Choice(plan, 1.0, 0.9)  # less than a step saves
    assert model.decoding_path() == "native step"


@pytest.mark.skipif(native.library() is None, reason=f"native kernels: {native.status()}")
@torch.no_grad()
def test_few_rows_use_the_native_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    whole = linear._native

    def watched(x: Tensor, *rest: Any) -> Tensor:
        calls.append(tuple(x.shape))
        return whole(x, *rest)

    monkeypatch.setattr(linear, "_native", watched)
    for inputs in (8, 7):
        layer = Linear(inputs, 4).bfloat16()
        calls.clear()
        for rows in (1, 16, 17):
            layer(made(1, rows, inputs, dtype=torch.bfloat16))
        # Pairs of inputs can be multiplied in any number of rows.
        most = 17 if native.has_bf16_gemm(inputs) else 16
        assert calls == [(1, rows, inputs) for rows in (1, 16, 17) if rows <= most]
    calls.clear()
    for rows in (8, 9):
        Linear(8, 4)(made(rows, 8))
    assert calls == [(8, 8)]
    monkeypatch.setattr(native, "_opened", lambda: native.choose("0"))
    Linear(8, 4)(made(1, 8))
    assert calls == [(8, 8)]


@pytest.mark.parametrize("amx", [0, 1])
def test_bfloat16_products_with_amx_are_pytorchs(monkeypatch: pytest.MonkeyPatch, amx: int) -> None:
    library = SimpleNamespace(mb_amx=lambda: amx)
    monkeypatch.setattr(native, "_opened", lambda: (library, "avx512_vnni_bf16", ""))
    assert native.has_bf16_gemm(8) is not bool(amx) and not native.has_bf16_gemm(7)
    monkeypatch.setattr(native, "_opened", lambda: (library, "avx512", ""))
    assert not native.has_bf16_gemm(8)
    # With the library's own AMX, it is the faster one for some rows.
    monkeypatch.setattr(native, "_opened", lambda: (library, "avx512_amx", ""))
    weight = made(8, 8, dtype=torch.bfloat16)
    for rows in (1, linear.FEW_BY_AMX, linear.FEW_BY_AMX + 1):
        own = linear._fastest(made(rows, 8, dtype=torch.bfloat16), weight, None) is linear._native
        assert own is (rows <= linear.FEW_BY_AMX)


@torch.no_grad()
def test_many_rows_of_pairs(level: str) -> None:
    """More inputs than one transposed block, more rows than accumulators, outputs that fill no panel."""
    dtype = torch.bfloat16
    for rows, outputs, inputs in ((18, 65, 3074), (517, 70, 514), (523, 1, 6200), (40, 200, 9216)):
        x, weight, bias = (
            made(rows, inputs, dtype=dtype),
            made(outputs, inputs, dtype=dtype, seed=1),
            made(outputs),
        )
        y, expected = (
            dense(x, weight, bias.to(dtype)),
            F.linear(x.double(), weight.double(), bias.to(dtype).double()),
        )
        own = native.has_bf16_gemm(inputs)
        if not own and platform.machine() == "aarch64":
            continue  # PyTorch's product, whose sums are rounded to bfloat16 more than twice there
        factor = 1 if own else 2
        off = (y - expected).abs()
        assert (off <= factor * bound(x, weight, bias, expected, dtype)).all(), (level, rows, outputs, inputs)
        if own:
            packed = formats.pack(weight, 12, 128)
            assert torch.equal(quantized_dense(x, packed, bias.to(dtype)), y)


def test_shapes_and_strides() -> None:
    layer = Linear(6, 4)
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        for x in (
            made(6),
            made(0, 6),
            made(2, 3, 6),
            made(6, 5).T,
            made(5, 12)[:, ::2],
            made(1, 6).expand(3, 6),
        ):
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            layer(made(2, 5))
        with pytest.raises(RuntimeError, match="dtype"):
            layer(made(2, 6).bfloat16())


@pytest.mark.parametrize("rows", [3, 20])
def test_gradients_equal_f_linear(rows: int) -> None:
    x, weight, bias = (made(*s).requires_grad_() for s in ((2, rows, 10), (7, 10), (7,)))
    upstream = made(2, rows, 7, seed=3)
    found = torch.autograd.grad(dense(x, weight, bias), (x, weight, bias), upstream)
    expected = torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), upstream)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # sums of up to 40 products of size 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [0, 1, 2], ids=["x", "weight", "bias"])
def test_gradient_of_one_argument(trained: int, dtype: torch.dtype) -> None:
    arguments = [
        made(*s, dtype=dtype).requires_grad_(i == trained) for i, s in enumerate(((2, 10), (7, 10), (7,)))
    ]
    dense(*arguments).sum().backward()
    assert [part.grad is not None for part in arguments] == [i == trained for i in range(3)]


def test_gradients_of_gradients() -> None:
    inputs = [made(*s).double().requires_grad_() for s in ((2, 3), (4, 3), (4,))]
    assert torch.autograd.gradcheck(linear.linear, inputs)
    assert torch.autograd.gradgradcheck(linear.linear, inputs)


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_gradients_reach_inputs_and_bias(bits: int) -> None:
    packed = formats.pack(made(9, 70), bits, 64)
    x, bias = made(5, 70).requires_grad_(), made(9).requires_grad_()
    upstream = made(5, 9, seed=3)
    y = quantized_dense(x, packed, bias)
    found = torch.autograd.grad(y, (x, bias), upstream)
    plain = F.linear(x, packed.unpack(torch.float32), bias)
    expected = torch.autograd.grad(plain, (x, bias), upstream)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_opcheck() -> None:
    x, weight, bias = (made(*s).requires_grad_() for s in ((2, 3, 10), (7, 10), (7,)))
    torch.library.opcheck(linear.linear, (x, weight, bias))
    torch.library.opcheck(linear.linear, (x.detach().bfloat16(), weight.detach().bfloat16(), None))
    for bits in (8, 4):
        packed = formats.pack(made(7, 10), bits, 128)
        torch.library.opcheck(linear.quantized_linear, (x, *packed[:3], bias, *packed[3:]))


def test_compile_export_vmap_and_autocast() -> None:
    layer, x = Linear(6, 4), made(3, 6)
    with torch.no_grad():
        expected = F.linear(x, layer.weight, layer.bias)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(4, 6))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)
        # An exported program runs where this package is not installed.
        rows = torch.export.Dim("rows", min=2, max=64)
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))
        assert not any("monoblock" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(made(20, 6)), layer(made(20, 6)))
        torch.testing.assert_close(torch.func.vmap(layer)(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [8, 4])
def test_matrices_are_dequantised_by_rows(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of rows at a time, whose float32 values stay in the caches, with the bits of the whole."""
    packed = formats.pack(made(21, 200), bits, 64)
    whole = packed.unpack(torch.bfloat16)
    rows: list[int] = []
    unpack = formats.QuantizedTensor._unpack

    def counted(self: formats.QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
        rows.append(self.rows)
        return unpack(self, dtype)

    monkeypatch.setattr(formats.QuantizedTensor, "_unpack", counted)
    monkeypatch.setattr(formats, "_CHUNK", 5 * 200)
    assert torch.equal(packed.unpack(torch.bfloat16), whole)
    assert rows == [5, 5, 5, 5, 1]
