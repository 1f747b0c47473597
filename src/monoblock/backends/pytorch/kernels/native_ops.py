"""What a prompt needs between its matrix products, on a CPU: attention, norms, rotary positions and
activations as custom operators over the native kernels, for float32 and bfloat16, without gradients.

    monoblock::attention(q, k, v, slopes?, valid?, segments?, scale, softcap, causal, window) -> Tensor
    monoblock::norm(x, weight, bias?, eps, rms) -> Tensor
    monoblock::turn(x, cos, sin) -> Tensor
    monoblock::activate(x, kind, gated) -> Tensor

`usable` says when they may be called; everything else is plain PyTorch's. Shape suffixes: b batch, q queries, k keys,
s tokens, h heads, g key/value heads, d head width, w width.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from monoblock import native
from monoblock.backends.pytorch.kernels.linear import plain
from monoblock.native.abi import ActivationCall, AttentionCall, NormCall, RopeCall, strides

LIBRARY: Any = native.library()
_DTYPES = (torch.float32, torch.bfloat16)


def usable(*tensors: Tensor | None) -> bool:
    """Whether the kernels are there and fit these tensors: one dtype, on the CPU, no gradient or transform of
    functions to come, and no program that is exported to run where the kernels may be missing."""
    # A compiler that traces this function cannot ask for the number of threads.
    if LIBRARY is None or not (torch.compiler.is_compiling() or native.preferred(torch.get_num_threads())):
        return False
    given = [x for x in tensors if x is not None]
    first = given[0].dtype
    if first not in _DTYPES or any(x.dtype != first or x.device.type != "cpu" for x in given):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return False
    return not torch.compiler.is_exporting() and not torch._C._are_functorch_transforms_active()


def _operator(name: str, schema: str) -> Callable[[Callable[..., Tensor]], Any]:
    """Registers an operator. Where nobody watches, calls go straight to the function: an operator's first call makes
    PyTorch import its compiler, which takes a second and 70 MB."""

    def made(function: Callable[..., Tensor]) -> Any:
        operator = torch.library.custom_op(f"monoblock::{name}", mutates_args=(), schema=schema)(function)

        @functools.wraps(function)
        def call(x: Tensor, *others: Any, **named: Any) -> Tensor:
            watched = torch.compiler.is_compiling() or not plain(x)
            return (operator if watched else function)(x, *others, **named)

        call.register_fake = operator.register_fake  # pyright: ignore[reportAttributeAccessIssue]
        return call

    return made


def _common(x: Tensor) -> dict[str, int]:
    return {"bf16": int(x.dtype == torch.bfloat16), "threads": torch.get_num_threads()}


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _dense(x: Tensor) -> Tensor:
    """The tensor, with channels that lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


# ---------------------------------------------------------------------------- attention


@_operator(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? slopes, Tensor? valid, Tensor? segments, "
    "float scale, float softcap, bool causal, int window) -> Tensor",
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    valid: Tensor | None,
    segments: Tensor | None,
    scale: float,
    softcap: float,
    causal: bool,
    window: int,
) -> Tensor:
    """Attention (b, q, h, d) of queries (b, h, q, d), the last of the keys (b, g, k, d), without a scores array.

    `slopes` (h,) are ALiBi's, float32; `valid` (b, k) is False for padding; a query sees keys of its own number in
    `segments` (b, k), int32; `softcap` and `window` are 0 for none. A query that sees nothing gets the values' mean.
    """
    q, k, v = _dense(q), _dense(k), _dense(v)
    b, h, queries, d = q.shape
    out = q.new_empty(b, queries, h, d)
    slopes = None if slopes is None else slopes.float().contiguous()
    valid, segments = (None if x is None else _dense(x) for x in (valid, segments))
    given = AttentionCall(
        **{name: x.data_ptr() for name, x in zip(("q", "k", "v", "out"), (q, k, v, out), strict=True)},
        q_strides=strides(*q.stride()[:3]),
        k_strides=strides(*k.stride()[:3]),
        v_strides=strides(*v.stride()[:3]),
        out_strides=strides(out.stride(0), out.stride(2), out.stride(1)),
        alibi_slopes=_pointer(slopes),
        valid=_pointer(valid),
        segments=_pointer(segments),
        valid_stride=0 if valid is None or valid.shape[0] == 1 else valid.stride(0),
        segments_stride=0 if segments is None or segments.shape[0] == 1 else segments.stride(0),
        batch=b,
        heads=h,
        kv_heads=k.shape[1],
        queries=queries,
        keys=k.shape[2],
        head_dim=d,
        window=window,
        scale=scale,
        softcap=softcap,
        causal=causal,
        **_common(q),
    )
    LIBRARY.mb_attention(ctypes.byref(given))
    return out


@attention.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    b, h, queries, d = q.shape
    return q.new_empty(b, queries, h, d)


# ---------------------------------------------------------------------------- norms


@_operator(
    "norm",
    "(Tensor x, Tensor weight, Tensor? bias, float eps, bool rms) -> Tensor",
)
def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """The root-mean-square or layer norm of x (..., w)."""
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = torch.empty_like(x)
    given = NormCall(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=_pointer(bias),
        out=out.data_ptr(),
        rows=x.numel() // x.shape[-1],
        width=x.shape[-1],
        eps=eps,
        rms=rms,
        **_common(x),
    )
    LIBRARY.mb_norm(ctypes.byref(given))
    return out


@norm.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# ---------------------------------------------------------------------------- rotary positions


@_operator("turn", "(Tensor x, Tensor cos, Tensor sin) -> Tensor")
def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (b, h, s, d) with the first channels turned by angles (b or 1, 1, s, turned); (b, s, h, d)."""
    x, cos, sin = _dense(x), cos.contiguous(), sin.contiguous()
    b, h, tokens, d = x.shape
    out = x.new_empty(b, tokens, h, d)
    given = RopeCall(
        x=x.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        out=out.data_ptr(),
        x_strides=strides(*x.stride()[:3]),
        out_strides=strides(out.stride(0), out.stride(2), out.stride(1)),
        angle_strides=strides(0 if cos.shape[0] == 1 else cos.stride(0), 0, cos.stride(2)),
        batch=b,
        heads=h,
        tokens=tokens,
        head_dim=d,
        rotary_dim=cos.shape[-1],
        **_common(x),
    )
    LIBRARY.mb_rope(ctypes.byref(given))
    return out


@turn.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    b, h, tokens, d = x.shape
    return x.new_empty(b, tokens, h, d)


# ---------------------------------------------------------------------------- activations


@_operator("activate", "(Tensor x, int kind, bool gated) -> Tensor")
def activate(x: Tensor, kind: int, gated: bool) -> Tensor:
    """act(x), the kind being a place in spec.ACTIVATIONS; if gated act(gate) * up of [gate | up], (..., 2 w)."""
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // (2 if gated else 1))
    width = out.shape[-1]
    given = ActivationCall(
        x=x.data_ptr(),
        out=out.data_ptr(),
        rows=out.numel() // width,
        width=width,
        kind=kind,
        gated=gated,
        **_common(x),
    )
    if LIBRARY.mb_activate(ctypes.byref(given)):
        raise ValueError(f"activation {kind}: expected a place in spec.ACTIVATIONS")
    return out


@activate.register_fake
def _(x: Tensor, kind: int, gated: bool) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], x.shape[-1] // (2 if gated else 1))
