"""Products with quantised matrices on CUDA: a Triton kernel for few rows, which dequantises codes in registers.

Imported by quantized_cuda.py if Triton is installed. formats.py documents the formats. Block sizes are not tuned.
"""

# Triton's types know neither the grid and the options of a launch nor `static_range`.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from monoblock.backends.pytorch.quantization.formats import QuantizedTensor

ROWS = tl.constexpr(16)  # minimum of the tensor cores; fewer rows are padded with zeros
OUTPUTS = 16  # outputs of a program: the minimum of the tensor cores, for as many programs as possible
HALF = tl.constexpr(64)  # weights of a step: in 4 bits, one nibble of a run's bytes
RUN = tl.constexpr(128)


@triton.jit
def _kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    low_ptr,
    bias_ptr,
    y_ptr,
    rows,
    outputs,
    inputs,
    padded,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    LOW: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    N: tl.constexpr,
):
    """y (rows, outputs) = x (rows, inputs) @ weights.T + bias, for N outputs. The codes of a group are
    multiplied as integers; scale and low are applied afterwards, in float32. ZEROS: low has the codes of 0."""
    m = tl.arange(0, ROWS)
    n = tl.program_id(0) * N + tl.arange(0, N)
    k = tl.arange(0, HALF)
    real_m, real_n = m < rows, n < outputs
    n64 = n.to(tl.int64)
    total = tl.zeros((ROWS, N), dtype=tl.float32)
    for run in range(padded // RUN):
        for half in tl.static_range(2):
            first = run * RUN + half * HALF
            x = tl.load(
                x_ptr + m[:, None] * inputs + first + k[None, :],
                mask=real_m[:, None] & (first + k[None, :] < inputs),
                other=0.0,
            )
            if BITS == 8:
                at = n64[:, None] * padded + first + k[None, :]
                codes = tl.load(codes_ptr + at, mask=real_n[:, None], other=0).to(tl.int32) - 128
            else:
                at = n64[:, None] * (padded // 2) + run * HALF + k[None, :]
                codes = tl.load(codes_ptr + at, mask=real_n[:, None], other=0).to(tl.int32)
                codes = (codes >> (4 * half)) & 15
                if not LOW:
                    codes -= 8
            group = n64 * (padded // GROUP) + first // GROUP
            scale = tl.load(scale_ptr + group, mask=real_n, other=0.0).to(tl.float32)
            # Integers up to 128 are exact in every dtype of x.
            part = tl.dot(x, tl.trans(codes.to(x.dtype)), input_precision="ieee")
            total += part * scale[None, :]
            if LOW:
                low = tl.load(low_ptr + group, mask=real_n, other=0).to(tl.float32)
                if ZEROS:
                    low = -scale * low
                total += tl.sum(x.to(tl.float32), axis=1)[:, None] * low[None, :]
    if BIAS:
        total += tl.load(bias_ptr + n, mask=real_n, other=0.0).to(tl.float32)[None, :]
    at = m[:, None].to(tl.int64) * outputs + n[None, :]
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=real_m[:, None] & real_n[None, :])


def few_rows(x_rk: Tensor, matrix: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """(rows, outputs) of x (rows, inputs), 1 to 16 rows, times a matrix in 8 or 4 bits."""
    codes, scale, low, bits, group, inputs = matrix
    assert scale is not None
    rows, outputs = x_rk.shape[0], matrix.rows
    y = x_rk.new_empty(rows, outputs)
    _kernel[(triton.cdiv(outputs, OUTPUTS),)](
        x_rk.contiguous(),
        codes.contiguous(),
        scale.contiguous(),
        # Placeholders: not read if the tensor is absent.
        scale if low is None else low.contiguous(),
        scale if bias is None else bias.contiguous(),
        y,
        rows,
        outputs,
        inputs,
        codes.shape[1] * 8 // bits,
        BITS=bits,
        GROUP=group,
        LOW=low is not None,
        ZEROS=matrix.zero_points,
        BIAS=bias is not None,
        N=OUTPUTS,
        num_warps=4,
        num_stages=4,
    )
    return y
