"""Products with quantised matrices on a GPU: dequantised in registers for few rows, in memory for many (and for the
lossless format, which saves memory on GPUs, not time).

The product of one token is bound by reading the codes, a quarter or an eighth of the size of fp32 weights. That of a
prompt is bound by arithmetic: the weights are dequantised once and multiplied by PyTorch's matmul.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from monoblock.backends.pytorch.quantization.formats import QuantizedTensor

FEW = 16  # rows


@functools.cache
def kernel() -> Callable[..., Tensor] | None:
    """The Triton kernel for few rows; None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from monoblock.backends.pytorch.kernels import triton_quantized

    return triton_quantized.few_rows


def multiply(x: Tensor, matrix: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """`x @ matrix.T + bias` in x's dtype, without gradients."""
    x_rk = x.reshape(-1, matrix.columns)
    # The kernel scales 64 products at once, and codes of 8 bits are exact in bfloat16 as signed integers only.
    plain = matrix.scale is not None and matrix.group >= 64 and (matrix.low is None or matrix.bits == 4)
    if plain and 0 < x_rk.shape[0] <= FEW and (few_rows := kernel()) is not None:
        with torch.cuda.device_of(x):  # Triton launches kernels on the current device
            y_rn = few_rows(x_rk, matrix, bias)
    else:
        y_rn = F.linear(x_rk, matrix.unpack(x.dtype), None if bias is None else bias.to(x.dtype))
    return y_rn.unflatten(0, x.shape[:-1])
