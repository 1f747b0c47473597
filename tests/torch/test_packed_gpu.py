"""Packed matrices on a GPU: which way a product takes, and the Triton kernel where its interpreter can be had.

Triton is no dependency of the CPU's PyTorch. Where it is installed (`pip install triton`), `TRITON_INTERPRET=1 pytest
tests/torch/test_packed_gpu.py` runs the kernel on the CPU, and without the variable its compilation for two GPUs.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from measure import assert_close

from monoblock.backends.pytorch.kernels import quantized_cuda
from monoblock.backends.pytorch.quantization import formats

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def packed(outputs: int, inputs: int, bits: int, group: int, *, low: bool = True, zeros: bool = False) -> Any:
    """`low`: 4 bits have one; without it code 8 stands for 0. `zeros`: zero points, of 4 bits."""
    random = torch.Generator().manual_seed(0)
    made = formats.pack(torch.randn(outputs, inputs, generator=random), bits, group)
    if zeros:
        points = torch.randint(0, 17, made.scale.shape, generator=random, dtype=torch.uint8)
        made = made._replace(low=points)
    made = made if low else made._replace(low=None)
    return made, made.unpack(torch.float64)


def rows_of(rows: int, inputs: int, dtype: Any) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (8, 128), (4, 64), (4, 128)])
@pytest.mark.parametrize("shape", [(40,), (2, 20), (1, 1), (3, 0)], ids=str)
@torch.no_grad()
def test_products(shape: tuple[int, ...], bits: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the kernel: the weights are unpacked, and the shape stays."""
    monkeypatch.setattr(quantized_cuda, "kernel", lambda: None)
    made, numbers = packed(24, 200, bits, group)
    x, bias = torch.randn(*shape, 200), torch.randn(24)
    y = quantized_cuda.multiply(x, made, bias)
    assert_close("unpacked", y, x.double() @ numbers.T + bias, 1e-4)  # sums of 200 numbers of the order of 1


def test_few_rows_use_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []

    def few_rows(x: torch.Tensor, matrix: formats.QuantizedTensor, _: Any) -> torch.Tensor:
        rows.append(x.shape[0])
        return x.new_zeros(x.shape[0], matrix.rows)

    monkeypatch.setattr(quantized_cuda, "kernel", lambda: few_rows)
    made, _ = packed(24, 200, 8, 128)
    for shape in ((1,), (2, 8), (17,), (0,)):
        quantized_cuda.multiply(torch.zeros(*shape, 200), made, None)
    assert rows == [1, 16]


def test_without_triton_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    quantized_cuda.kernel.cache_clear()
    assert quantized_cuda.kernel() is None
    quantized_cuda.kernel.cache_clear()


FORMS = [
    (8, True, False),
    (4, True, False),
    (4, False, False),
    (4, True, True),
]  # bits, whether 4 bits have a low, and whether it has zero points
CASES = [(*form, group, *size) for form in FORMS for group in (64, 128) for size in ((40, 200), (16, 64))]


@pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="needs triton and TRITON_INTERPRET=1")
@pytest.mark.parametrize(("bits", "low", "zeros", "group", "outputs", "inputs"), CASES)
# Not bf16, which the interpreter has not: NumPy lacks it.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@torch.no_grad()
def test_kernel_in_the_interpreter(
    bits: int, low: bool, zeros: bool, group: int, outputs: int, inputs: int, dtype: Any
) -> None:
    made, numbers = packed(outputs, inputs, bits, group, low=low, zeros=zeros)
    for rows, bias in ((1, None), (3, torch.randn(outputs).to(dtype)), (16, None)):
        x = rows_of(rows, inputs, dtype)
        y = quantized_cuda.multiply(x, made, bias)
        reference = x.double() @ numbers.T + (0 if bias is None else bias.double())
        # Sums of the order of 40; in fp16 the result is rounded to 11 bits.
        assert_close("kernel", y, reference, 5e-5 if dtype == torch.float32 else 0.04)


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs triton, and TRITON_INTERPRET not to be set")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("bits", "low", "zeros"), FORMS)
def test_the_kernel_compiles_for_a_gpu(
    bits: int, low: bool, zeros: bool, dtype: str, capability: int
) -> None:
    """To the machine code of an A100 and an H100, for which no GPU is needed; 16-bit products use the matrix units."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from monoblock.backends.pytorch.kernels import triton_quantized

    pointers = {"x": dtype, "codes": "u8", "scale": "fp16", "bias": dtype, "y": dtype}
    pointers["low"] = "u8" if zeros else "fp16"
    signature = {f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()}
    signature |= dict.fromkeys(("rows", "outputs", "inputs", "padded"), "i32")
    constants = {
        "BITS": bits,
        "GROUP": 128,
        "LOW": low and bits == 4,
        "ZEROS": zeros,
        "BIAS": True,
        "N": triton_quantized.OUTPUTS,
    }
    signature |= dict.fromkeys(constants, "constexpr")
    names = triton_quantized._kernel.arg_names
    source = ASTSource(
        fn=triton_quantized._kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert made.asm["cubin"]
    assert ("mma.sync" in made.asm["ptx"]) == (dtype != "fp32")
