"""Attention on a CPU with a backward pass: PyTorch's flash kernels for one block of queries at a time, in float32.

    a block     has only the keys that its queries may attend to, and its own mask
    bfloat16    is converted to float32, in which these kernels are as fast or faster without AMX

Kept for the backward pass: queries, keys and values as they are given, before the heads of a group are repeated; the
output; a float32 per query and head. Masks are computed again.

Measured on two cores of a Zen 4 server with 4 x 512 tokens, 12 heads of 64 channels, bfloat16, in milliseconds of the
forward and the backward pass: all earlier keys in one call of PyTorch's kernel 24 and 52, a window of 256 in blocks of
256 24 and 44; the same window in float32 by blocks of 128 17 and 34.

Shape suffixes: b batch, q queries, k keys, h heads, g key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from monoblock.backends.pytorch.kernels import dispatch
from monoblock.backends.pytorch.ops import Kernel, Scope, repeat_groups

QUERY_BLOCK = 128  # queries of a block

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def usable(q_bhqd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, scope: Scope, kernel: Kernel) -> bool:
    """Whether `attend` takes these: plain tensors with gradients on a CPU, without what the kernels lack, or ALiBi,
    whose mask differs between heads."""
    heads = q_bhqd, k_bgkd, v_bgkd
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in heads):
        return False
    if kernel.dropout or kernel.softcap is not None or q_bhqd.numel() == 0:
        return False
    if scope.given is not None or scope.relative is not None or scope.slopes_h is not None:
        return False
    return dispatch.native(*heads, gradient=True) and q_bhqd.dtype == k_bgkd.dtype == v_bgkd.dtype


def attend(q_bhqd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, scope: Scope, scale: float) -> Tensor:
    """Attention (b, h, q, d), whose memory is (b, q, h, d)."""
    return _Attention.apply(q_bhqd, k_bgkd, v_bgkd, scope, scale)  # pyright: ignore[reportReturnType]


class _Block(NamedTuple):
    """Queries of a range and the keys that they may attend to. `bias` (b or 1, 1, q, k); None: all of them, or those of
    the kernel's causal mask."""

    queries: slice
    keys: slice
    causal: bool
    bias: Tensor | None


def _blocks(scope: Scope, dtype: torch.dtype) -> Iterator[_Block]:
    queries, keys = scope.index_q.shape[0], scope.index_k.shape[0]
    masked = scope.valid_bk is not None or scope.segment_bk is not None
    if not (masked or scope.causal or scope.window):
        yield _Block(slice(queries), slice(keys), False, None)
        return
    for start in range(0, queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, queries)
        first, last = scope.keys_of(start, stop)
        near = scope.window is None or scope.window >= stop
        if start == 0 and scope.causal and scope.aligned and near and not masked:
            yield _Block(slice(stop), slice(stop), True, None)
        else:
            bias = scope.bias(start, stop, first, last, dtype)
            yield _Block(slice(start, stop), slice(first, last), False, bias)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_bhqd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, scope: Scope, scale: float
    ) -> Tensor:
        exact = torch.promote_types(q_bhqd.dtype, torch.float32)
        b, h, queries, d = q_bhqd.shape
        q, k, v = (_wide(x, h, exact) for x in (q_bhqd, k_bgkd, v_bgkd))
        out = q_bhqd.new_empty(b, queries, h, d).transpose(1, 2)
        sums = q.new_empty(b, h, queries)  # log of the sums of exp(score)
        for own in _blocks(scope, exact):
            out[:, :, own.queries], sums[:, :, own.queries] = _forward(
                q[:, :, own.queries],
                k[:, :, own.keys],
                v[:, :, own.keys],
                0.0,
                own.causal,
                attn_mask=_for_heads(own, q),
                scale=scale,
            )
        ctx.save_for_backward(q_bhqd, k_bgkd, v_bgkd, out, sums)
        ctx.scope, ctx.scale = scope, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        q_bhqd, k_bgkd, v_bgkd, out, sums = ctx.saved_tensors
        h, exact = q_bhqd.shape[1], sums.dtype
        q, k, v, out, gradient = (_wide(x, h, exact) for x in (q_bhqd, k_bgkd, v_bgkd, out, gradients[0]))
        to_q, to_k, to_v = _like(q), _like(k).zero_(), _like(v).zero_()
        for own in _blocks(ctx.scope, exact):
            parts = _backward(
                gradient[:, :, own.queries],
                q[:, :, own.queries],
                k[:, :, own.keys],
                v[:, :, own.keys],
                out[:, :, own.queries],
                sums[:, :, own.queries],
                0.0,
                own.causal,
                attn_mask=_for_heads(own, q),
                scale=ctx.scale,
            )
            to_q[:, :, own.queries] = parts[0]
            to_k[:, :, own.keys] += parts[1]
            to_v[:, :, own.keys] += parts[2]
        to_k, to_v = (_summed(x, k_bgkd.shape[1]) for x in (to_k, to_v))
        return *(x.to(q_bhqd.dtype) for x in (to_q, to_k, to_v)), None, None


def _wide(x_bgkd: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Heads in the kernels' dtype, with channels of stride 1; those of a group are repeated."""
    x = repeat_groups(x_bgkd.to(dtype), heads)
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x_bhkd: Tensor) -> Tensor:
    """Uninitialised (b, h, k, d), whose memory is (b, k, h, d), as that of projections."""
    b, h, k, d = x_bhkd.shape
    return x_bhkd.new_empty(b, k, h, d).transpose(1, 2)


def _summed(x_bhkd: Tensor, groups: int) -> Tensor:
    """The sums over the heads of a group (b, g, k, d)."""
    return x_bhkd if x_bhkd.shape[1] == groups else x_bhkd.unflatten(1, (groups, -1)).sum(2)


def _for_heads(own: _Block, q_bhqd: Tensor) -> Tensor | None:
    return None if own.bias is None else own.bias.expand(q_bhqd.shape[0], q_bhqd.shape[1], -1, -1)
