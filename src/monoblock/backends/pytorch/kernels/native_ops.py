"""Attention, norms, RoPE and activations of a prompt by the native CPU kernels, for float32 and bfloat16, without
gradients.

`usable` tells whether tensors may be passed to them; otherwise PyTorch's operators are used. Shape suffixes: b batch, q
queries, k keys, s tokens, h heads, g key/value heads, d head width, w width.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from monoblock import native
from monoblock.backends.pytorch.kernels import dispatch
from monoblock.native.abi import ActivationCall, AttentionCall, NormCall, RopeCall, strides

LIBRARY: Any = native.library()
DTYPES = {torch.float32, torch.bfloat16}


def usable(*tensors: Tensor | None) -> bool:
    """Whether the kernels are available and support these tensors: of one supported dtype, plain and eager."""
    if LIBRARY is None or not dispatch.native(*tensors):
        return False
    dtypes = {x.dtype for x in tensors if x is not None}
    return len(dtypes) == 1 and dtypes <= DTYPES


def _common(x: Tensor) -> dict[str, int]:
    return {"bf16": int(x.dtype == torch.bfloat16), "threads": torch.get_num_threads()}


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _dense(x: Tensor) -> Tensor:
    """The tensor with channels of stride 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


# ---------------------------------------------------------------------------- attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    valid: Tensor | None,
    segments: Tensor | None,
    relative: Tensor | None,
    scale: float,
    softcap: float,
    causal: bool,
    window: int,
) -> Tensor:
    """Attention (b, q, h, d) of queries (b, h, q, d), the last of the keys (b, g, k, d), without a scores array.

    `slopes` (h,) are ALiBi's, float32; `valid` (b, k) is False for padding; a query attends to keys of its own document
    in `segments` (b, k), int32; `relative` (2 r + 1, h) has a bias for each distance key - query from -r to r;
    `softcap` and `window` are 0 for none. The output of a fully masked query is the mean of all values.
    """
    q, k, v = _dense(q), _dense(k), _dense(v)
    b, h, queries, d = q.shape
    out = q.new_empty(b, queries, h, d)
    slopes = None if slopes is None else slopes.float().contiguous()
    valid, segments = (None if x is None else _dense(x) for x in (valid, segments))
    table = None if relative is None else relative_table(relative)
    given = AttentionCall(
        **{name: x.data_ptr() for name, x in zip(("q", "k", "v", "out"), (q, k, v, out), strict=True)},
        q_strides=strides(*q.stride()[:3]),
        k_strides=strides(*k.stride()[:3]),
        v_strides=strides(*v.stride()[:3]),
        out_strides=strides(out.stride(0), out.stride(2), out.stride(1)),
        alibi_slopes=_pointer(slopes),
        relative=_pointer(table),
        relative_stride=0 if table is None else table.shape[1],
        relative_center=0 if relative is None else relative.shape[0] // 2,
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


# Elements after a row of relative biases that the library's vector loads may read: the lanes of the widest vectors.
_LANES = 16


def relative_table(bias_nh: Tensor) -> Tensor:
    """Biases (n, h) of distances as the library reads them: (h, n + _LANES), float32, with zeros at the end."""
    return torch.nn.functional.pad(bias_nh.t().float(), (0, _LANES)).contiguous()


# ---------------------------------------------------------------------------- norms


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


# ---------------------------------------------------------------------------- RoPE


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads (b, h, s, d) with RoPE on the first channels by angles (b or 1, 1, s, channels): (b, s, h, d)."""
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


# ---------------------------------------------------------------------------- activations


def activate(x: Tensor, kind: int, gated: bool) -> Tensor:
    """act(x), `kind` being an index of spec.ACTIVATIONS; if gated act(gate) * up of [gate | up], (..., 2 w)."""
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
        raise ValueError(f"activation {kind}: expected an index of spec.ACTIVATIONS")
    return out
