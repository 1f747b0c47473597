"""Products with packed matrices on a GPU: codes are unpacked in registers for few rows, in memory for many (and where
they are packed without loss, which saves memory there, not time).

One token's product costs the time to read the codes, an eighth or a quarter of what the weights would take in fp32. A
prompt's costs the multiplications: the weights are unpacked once and multiplied by PyTorch's own product.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from monoblock.backends.pytorch.quantization import formats

FEW = 16  # rows


@functools.cache
def kernel() -> Callable[..., Tensor] | None:
    """The Triton kernel for few rows; None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from monoblock.backends.pytorch.kernels import triton_packed

    return triton_packed.few_rows


def multiply(
    x: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    low: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    in_features: int,
) -> Tensor:
    """`x @ weight.T + bias` in x's dtype, without gradients."""
    x_rk = x.reshape(-1, in_features)
    if 0 < x_rk.shape[0] <= FEW and scale is not None and (few_rows := kernel()) is not None:
        with torch.cuda.device_of(x):  # Triton starts kernels on the current one
            y_rn = few_rows(x_rk, codes, scale, low, bias, bits=bits, group=group)
    else:
        weight = formats.unpack(codes, scale, low, bits=bits, group=group, inputs=in_features, dtype=x.dtype)
        y_rn = F.linear(x_rk, weight, None if bias is None else bias.to(x.dtype))
    return y_rn.unflatten(0, x.shape[:-1])
