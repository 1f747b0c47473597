"""Dense layers: the choice of the fastest implementation for device, dtype and number of rows; their operators.

    monoblock::linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor
        x (..., in), weight (out, in), both of one dtype; gives (..., out) in x's dtype. Differentiable, twice too.
    monoblock::packed_linear(Tensor x, Tensor codes, Tensor? scale, Tensor? low, Tensor? bias,
                             int bits, int group, int in_features) -> Tensor
        x (..., in_features); codes, scale and low as in formats.py; bias in float32 or bfloat16. Gradients reach x and
        the bias.

The rules, with what was measured on one core of a Zen 5 server (a matrix of 11264 x 2048; the rates count weights read;
all that the core can read is 40 GB/s, and two cores together 50 to 80):

    CPU, bfloat16, up to 16 rows   the native kernels; at 1, 2, 4, 8, 16 rows 33, 39, 34, 27, 12 GB/s,
                                   where F.linear has 16, 17, 16, 15, 12
    CPU, float32, up to 8 rows     the native kernels; at 1, 2, 4, 8 rows 37, 32, 25, 15 GB/s, where F.linear (MKL) has
                                   16, 10, 10, 8 and oneDNN 21, 18, 18, 16; at 16 oneDNN is 15% faster
    CPU, float32, more; training   oneDNN on the plain matrix: more than twice MKL's rate, which treats other vendors'
                                   processors as old ones; forward and backward alike
    CPU, bfloat16, more rows       with AVX-512 BF16 the native kernels, 1.02 to 1.1 times F.linear (oneDNN), which
                                   reorders the weights in each product; without it F.linear; in training
                                   the forward pass alike, F.linear in the backward pass
    CPU, bfloat16, AMX             the native kernels up to 64 rows: at 8 and 32 rows 1.6 and 1.8 times F.linear (one
                                   core of a Xeon, Emerald Rapids), which is 1.25 times as fast at 256
    CPU, quantised, any rows          the native kernels; with 512 rows 1.3 times the products a second of bfloat16.
                                   Without dot products of integers more than 16 rows are dequantised
    otherwise                      F.linear
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from ctypes import byref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monoblock import native
from monoblock.backends.pytorch.kernels import dispatch, quantized_cuda, recompute
from monoblock.backends.pytorch.quantization import formats
from monoblock.backends.pytorch.quantization.formats import QuantizedTensor
from monoblock.native import tuning
from monoblock.native.abi import Matrix
from monoblock.quantization import LOSSLESS

FEW = 16  # rows up to which a product is bound by reading the weights
FEW_OF = {torch.float32: 8, torch.bfloat16: FEW}  # for unquantised weights
# Rows of bfloat16 up to which the native kernels are faster than PyTorch's, where both have AMX.
FEW_BY_AMX = 64
# Weights that are dequantised at a time: they stay in the CPU's caches, in reused memory.
BLOCK = 1 << 22
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
FORMATS = {dtype: native.FORMATS[name] for dtype, name in NAMES.items()}
QUANTIZED = {8: native.FORMATS["int8"], 4: native.FORMATS["int4"], LOSSLESS: native.FORMATS["lossless"]}
SCALE_FORMATS = {getattr(torch, name): number for name, number in native.abi.SCALE_FORMATS.items()}

# On other architectures PyTorch is built with libraries for the processor.
ONEDNN = (
    platform.machine().lower() in ("x86_64", "amd64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


class Linear(nn.Linear):
    """`nn.Linear`, faster on a CPU."""

    fusible = True  # its product is `dense`, so that adjacent ones can be fused

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight, self.bias)(input, self.weight, self.bias)


def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear(x, weight, bias)` by the rules above."""
    return product(x, weight, bias)(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
    """The function to multiply these by, according to the rules above; it takes the same three arguments."""
    fits = x.is_cpu and x.dtype in FORMATS and weight.dtype == x.dtype
    if not (fits and dispatch.native(x, weight, bias, gradient=True)):
        return F.linear
    trained = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    return Product.apply if trained and torch.is_grad_enabled() else _fastest(x, weight, bias)


def _fastest(x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
    """`product` without gradients."""
    if x.is_cpu and x.dtype in FORMATS and weight.dtype == x.dtype and x.shape[-1:] == weight.shape[1:]:
        size, inputs = x.numel(), weight.shape[1]
        if x.dtype == torch.bfloat16 and native.has_amx():
            own = size <= FEW_BY_AMX * inputs
        else:
            own = size <= FEW_OF[x.dtype] * inputs or _by_pairs(x, inputs)
        own &= size > 0 and weight.is_contiguous() and _bias_fits(bias, weight.shape[0])
        if own and native.library() is not None:
            rows = size // inputs
            if rows > FEW or not tuning.loses(NAMES[x.dtype], rows, torch.get_num_threads()):
                return _native
        if ONEDNN and size and x.dtype == torch.float32 and weight.numel():
            return _onednn
    return F.linear


def _by_pairs(x: Tensor, inputs: int) -> bool:
    """Whether the native kernels are the fastest for any number of rows of bfloat16."""
    return x.dtype == torch.bfloat16 and native.has_bf16_gemm(inputs)


def _bias_fits(bias: Tensor | None, outputs: int) -> bool:
    return bias is None or (bias.dtype in FORMATS and bias.shape == (outputs,) and bias.is_contiguous())


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def native_matrix(weight: Tensor | QuantizedTensor, bias: Tensor | None) -> Matrix:
    """A matrix (outputs, inputs) and its bias as the native library's structure, which holds pointers, not
    references."""
    where = None if bias is None else bias.data_ptr()
    bias_format = 0 if bias is None else FORMATS[bias.dtype]
    if isinstance(weight, QuantizedTensor):
        codes, scale, low, bits, group, columns = weight
        return Matrix(
            codes.data_ptr(),
            None if scale is None else scale.data_ptr(),
            None if low is None else low.data_ptr(),
            where,
            codes.shape[0],
            columns,
            QUANTIZED[bits],
            group,
            bias_format,
            0 if scale is None else SCALE_FORMATS[scale.dtype] + native.abi.ZERO_POINTS * weight.zero_points,
        )
    outputs, inputs = weight.shape
    return Matrix(
        weight.data_ptr(), None, None, where, outputs, inputs, FORMATS[weight.dtype], 0, bias_format
    )


def _native(x: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None) -> Tensor:
    """`mb_linear` over plain weights of x's dtype, or quantised ones."""
    matrix, flat = native_matrix(weight, bias), x.reshape(-1, x.shape[-1])
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    outputs, kind = matrix.outputs, FORMATS[x.dtype]
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype)
    arguments = (flat.data_ptr(), kind, flat.stride(0), flat.shape[0], y.data_ptr(), kind, outputs)
    if native.library().mb_linear(byref(matrix), *arguments, torch.get_num_threads()):
        raise MemoryError(f"no memory for the inputs of a product with {outputs} x {x.shape[-1]} weights")
    return y


# ---------------------------------------------------------------------------- monoblock::linear


@torch.library.custom_op(
    "monoblock::linear", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` as a separate operator."""
    return _fastest(x, weight, bias)(x, weight, bias)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx.needs_input_grad, gradient, *ctx.saved_tensors)


def _gradients(
    needs: Sequence[bool], gradient: Tensor, x: Tensor | None, weight: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias that are needed: that of x needs the weight, that of the weight x."""
    to_x = to_weight = None
    own = gradient.reshape(-1, gradient.shape[-1])
    # `dense` again: as fast, and differentiable itself.
    if needs[0] and weight is not None:
        to_x = dense(gradient, weight.t(), None)
    if needs[1] and x is not None:
        to_weight = dense(own.t(), x.reshape(-1, x.shape[-1]).t(), None)
    return to_x, to_weight, own.sum(0) if needs[2] else None


linear.register_autograd(_backward, setup_context=_keep)


class Product(torch.autograd.Function):
    """`linear` with gradients in eager mode: the operator's autograd formula would make PyTorch import its compiler,
    which takes a second and 70 MB."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs = ctx.needs_input_grad
        recompute.keep(ctx, x if needs[1] else None, weight if needs[0] else None)
        return _fastest(x, weight, bias)(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx.needs_input_grad, gradients[0], *recompute.kept(ctx))


# ---------------------------------------------------------------------------- fused layers


def fused(x: Tensor, part: Any, group: tuple[str, ...]) -> Tensor | None:
    """The outputs (..., sum of outputs) of a group's linear layers in one product; None if the layers must be
    called one by one (see `Part.fused`)."""
    if dispatch.transformed() or dispatch.autocast(x.device):
        return None
    held = part.fused(group)
    if held is None:
        return None
    bias = held.get("bias")
    modules = [part.role(role) for role in group]
    if "codes" in held:
        trained = [m.bias for m in modules if m.bias is not None and m.bias.requires_grad]
        if trained and torch.is_grad_enabled():
            return None
        form = modules[0].bits, modules[0].group, modules[0].columns
        return quantized_dense(
            x, QuantizedTensor(held["codes"], held.get("scale"), held.get("low"), *form), bias
        )
    tensors = [m.weight for m in modules] + ([] if bias is None else [m.bias for m in modules])
    if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors)):
        return JointProduct.apply(x, held["weight"], bias, *tensors)  # pyright: ignore
    return product(x, held["weight"], bias)(x, held["weight"], bias)


class JointProduct(torch.autograd.Function):
    """One product with several adjacent matrices, and the gradient of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *tensors: Tensor) -> Tensor:
        recompute.keep(ctx, x, *tensors)
        ctx.whole, ctx.biased = weight, bias is not None
        return _fastest(x, weight, bias)(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, *tensors = recompute.kept(ctx)
        weights = tensors[: len(tensors) // 2] if ctx.biased else tensors
        rows, needs = [w.shape[0] for w in weights], ctx.needs_input_grad
        # For double backward, the graph must reach the weights themselves.
        weight = torch.cat(weights) if torch.is_grad_enabled() else ctx.whole
        own = gradient.reshape(-1, weight.shape[0])
        to_x = dense(gradient, weight.t(), None) if needs[0] else None
        to_weights: list[Tensor | None] = [None] * len(rows)
        to_biases: list[Tensor | None] = [None] * (len(rows) if ctx.biased else 0)
        if any(needs[3 : 3 + len(rows)]):
            to_weights = list(dense(own.t(), x.reshape(-1, weight.shape[1]).t(), None).split(rows))
        if any(needs[3 + len(rows) :]):
            to_biases = list(own.sum(0).split(rows))
        return to_x, None, None, *to_weights, *to_biases


# ---------------------------------------------------------------------------- monoblock::packed_linear


@torch.library.custom_op(
    "monoblock::packed_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor codes, Tensor? scale, Tensor? low, Tensor? bias, int bits, int group, int in_features)"
    " -> Tensor",
)
def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    low: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    in_features: int,
) -> Tensor:
    """The product with a quantised matrix, whose tensors are separate arguments of the operator."""
    return _quantized(x, QuantizedTensor(codes, scale, low, bits, group, in_features), bias)


def quantized_dense(x: Tensor, matrix: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """`x @ matrix.T + bias`; `quantized_linear`, bypassing the dispatcher for plain eager tensors. Function transforms,
    for which the operator has no rules, go through PyTorch's own operators."""
    if dispatch.differentiated():
        return formats.multiply(x, matrix, bias)
    codes, scale, low, *form = matrix
    trained = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if dispatch.readable(x, codes, scale, low) and not trained:
        return _quantized(x, matrix, bias)
    return quantized_linear(x, codes, scale, low, bias, *form)


def _quantized(x: Tensor, matrix: QuantizedTensor, bias: Tensor | None) -> Tensor:
    if x.is_cuda:
        return quantized_cuda.multiply(x, matrix, bias)
    codes, scale, low, _, _, inputs = matrix
    fits = x.is_cpu and x.dtype in FORMATS and x.shape[-1] == inputs and codes.is_contiguous()
    fits = fits and (scale is None or scale.is_contiguous()) and (low is None or low.is_contiguous())
    if fits and x.numel() and codes.shape[0] and _bias_fits(bias, codes.shape[0]):
        library = native.library()
        many = _by_pairs(x, inputs) if scale is None else native.has_int8_gemm()
        if library is not None and (many or x.numel() <= FEW * inputs):
            return _native(x, matrix, bias)
        if library is not None and scale is None:
            return _by_blocks(library, x, matrix, bias)
    return formats.multiply(x, matrix, bias)


def _by_blocks(library: Any, x: Tensor, matrix: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """The product with a 12-bit matrix, of which one block of rows at a time is decompressed to bfloat16."""
    y = x.new_empty((*x.shape[:-1], matrix.rows))
    step = max(1, BLOCK // matrix.columns)
    for first in range(0, matrix.rows, step):
        rows = slice(first, first + step)
        weight = _bfloat16(library, matrix.select(rows)).to(x.dtype)
        own = None if bias is None else bias[rows].to(x.dtype)
        y[..., rows] = _fastest(x, weight, own)(x, weight, own)
    return y


def _bfloat16(library: Any, matrix: QuantizedTensor) -> Tensor:
    """A 12-bit matrix decompressed to bfloat16 by the library."""
    weight = torch.empty((matrix.rows, matrix.columns), dtype=torch.bfloat16)
    library.mb_unfold(byref(native_matrix(matrix, None)), weight.data_ptr(), torch.get_num_threads())
    return weight


@quantized_linear.register_fake
def _(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _keep_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, codes, scale, low, bias, bits, group, in_features = inputs
    ctx.save_for_backward(codes, scale, low)
    ctx.form, ctx.bias_dtype = (bits, group, in_features), None if bias is None else bias.dtype


def _packed_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    codes, scale, low = ctx.saved_tensors
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        weight = QuantizedTensor(codes, scale, low, *ctx.form).unpack(gradient.dtype)
        to_x = linear(gradient, weight.t(), None)
    if ctx.needs_input_grad[4]:
        to_bias = gradient.reshape(-1, codes.shape[0]).sum(0).to(ctx.bias_dtype)
    return to_x, None, None, None, to_bias, None, None, None


quantized_linear.register_autograd(_packed_backward, setup_context=_keep_packed)
