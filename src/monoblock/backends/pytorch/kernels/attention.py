"""The attention kernels: one function for each `attn_implementation`, all with the same signature and result.

Shape suffixes: b batch, q queries, k keys, h heads, g key/value heads (h / g heads share one), d head width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from monoblock.backends.pytorch.kernels import (
    attention_cuda,
    attention_flex,
    attention_training,
    dispatch,
    native_ops,
)
from monoblock.backends.pytorch.ops import Kernel, Scope, repeat_groups

# Queries of a block of the blockwise kernel: their mask of QUERY_BLOCK x keys stays in the CPU's cache.
QUERY_BLOCK = 256


def attend(q_bhqd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, scope: Scope, kernel: Kernel) -> Tensor:
    """Attention without a heads x queries x keys array; (b, h, q, d).

    On a GPU: see attention_cuda.py. One query: one fused call. On a CPU without gradients: the native kernel; with
    gradients, unless there is ALiBi, dropout or a softcap: attention_training.py. Queries
    aligned with the keys, on a CPU: one call of the flash kernel, with ALiBi and padding as a bias on the keys.
    Otherwise: the fused kernel for each block of queries in order, with its own mask; in training the mask is
    recomputed for the backward pass. Compiled, exported, traced and transformed calls: `_portable`.
    """
    if dispatch.autocast(q_bhqd.device):
        # The heads have autocast's dtype already; in that dtype a mask's minimum would overflow and ALiBi be too
        # coarse.
        with torch.autocast(q_bhqd.device.type, enabled=False):
            return attend(q_bhqd.to(v_bgkd.dtype), k_bgkd.to(v_bgkd.dtype), v_bgkd, scope, kernel)
    if dispatch.transformed():
        return _portable(q_bhqd, k_bgkd, v_bgkd, scope, kernel)
    if q_bhqd.device.type in attention_cuda.DEVICES:
        out = attention_cuda.attend(q_bhqd, k_bgkd, v_bgkd, scope, kernel)
        if out is not None:
            return fill_fully_masked(out, v_bgkd, scope)
    if q_bhqd.shape[2] == 1 and kernel.softcap is None:
        return _one_query(q_bhqd, k_bgkd, v_bgkd, scope, kernel)
    ordinary = scope.in_order and scope.given is None and not kernel.dropout
    biased = scope.relative is not None and not dispatch.native(scope.relative.bias_nh)
    if ordinary and not biased and native_ops.usable(q_bhqd, k_bgkd, v_bgkd):
        out = _native(q_bhqd, k_bgkd, v_bgkd, scope, kernel)
        return out if scope.masked_rows == "all" else fill_fully_masked(out, v_bgkd, scope)
    if attention_training.usable(q_bhqd, k_bgkd, v_bgkd, scope, kernel):
        out = attention_training.attend(q_bhqd, k_bgkd, v_bgkd, scope, kernel.scale)
        return fill_fully_masked(out, v_bgkd, scope)
    k_bhkd, v_bhkd = repeat_groups(k_bgkd, q_bhqd.shape[1]), repeat_groups(v_bgkd, q_bhqd.shape[1])
    if scope.aligned and scope.by_key and not kernel.dropout and kernel.softcap is None:
        bias = scope.key_bias()
        if bias is None:
            return F.scaled_dot_product_attention(
                q_bhqd, k_bhkd, v_bhkd, is_causal=scope.causal, scale=kernel.scale
            )
        if dispatch.native(q_bhqd, k_bhkd, v_bhkd, gradient=True):
            out = _flash_cpu(q_bhqd, k_bhkd, v_bhkd, bias, scope.causal, kernel.scale)
            return fill_fully_masked(out, v_bhkd, scope)
    return fill_fully_masked(_by_blocks(q_bhqd, k_bhkd, v_bhkd, scope, kernel), v_bhkd, scope)


def _portable(q_bhqd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, scope: Scope, kernel: Kernel) -> Tensor:
    """One call of the public fused function, whose mask all layers of a window share: nothing depends on a value or
    branches on a length, so that one program serves all lengths. Under function transforms the formula, which has all
    derivatives; also for a softcap."""
    if kernel.softcap is not None or dispatch.differentiated():
        return attend_eager(q_bhqd, k_bgkd, v_bgkd, scope, kernel)[0]
    k_bhkd, v_bhkd = repeat_groups(k_bgkd, q_bhqd.shape[1]), repeat_groups(v_bgkd, q_bhqd.shape[1])
    mask = _mask(scope, mask_dtype(q_bhqd.dtype, q_bhqd.device))
    out = F.scaled_dot_product_attention(
        q_bhqd,
        k_bhkd,
        v_bhkd,
        attn_mask=mask,
        dropout_p=kernel.dropout,
        is_causal=mask is None and scope.causal,
        scale=kernel.scale,
    )
    if torch.compiler.is_exporting():
        # The kernel chooses the output's strides, and a later lowering may choose others.
        out = out.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    return fill_fully_masked(out, v_bhkd, scope)


def _mask(scope: Scope, dtype: torch.dtype) -> Tensor | None:
    """The additive mask; None if the kernel's causal mask is sufficient."""
    if scope.aligned and scope.by_key and scope.valid_bk is None and scope.slopes_h is None:
        return None
    if "mask" not in scope.memo:
        scope.memo["mask"] = scope.bias(0, None, 0, None, dtype)
    return scope.memo["mask"]


def prepare(scope: Scope, windows: Sequence[int | None], dtype: torch.dtype) -> None:
    """Precompute the masks that the blocks of a transformed call share, since a compiled, checkpointed block cannot
    store them. `dtype`: that of the hidden states."""
    if not dispatch.transformed() or not scope.aligned:
        return
    device = scope.index_k.device
    if dispatch.autocast(device):
        dtype = torch.get_autocast_dtype(device.type)
    for window in dict.fromkeys(windows):
        own = scope if window is None else scope.with_window(window, scope.index_k.shape[0])
        own.fully_masked()
        _mask(own, mask_dtype(dtype, device))


def _native(q_bhqd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, scope: Scope, kernel: Kernel) -> Tensor:
    """The native kernel: grouped heads without copies, exact ALiBi at any distance, and KV blocks that are
    masked for all queries are skipped. Fully masked rows get the mean of all values (`fill_fully_masked`)."""
    segments = None if scope.segment_bk is None else scope.segment_bk.to(torch.int32)
    out_bqhd = native_ops.attention(
        q_bhqd,
        k_bgkd,
        v_bgkd,
        scope.slopes_h,
        scope.valid_bk,
        segments,
        None if scope.relative is None else scope.relative.bias_nh,
        kernel.scale,
        kernel.softcap or 0.0,
        scope.causal,
        scope.window or 0,
    )
    return out_bqhd.transpose(1, 2)


def fill_fully_masked(out_bhqd: Tensor, v_bgkd: Tensor, scope: Scope) -> Tensor:
    """Give fully masked queries equal weights on the keys chosen by the spec's `masked_rows`, so that all kernels agree
    on padding too, which enters losses over all positions of a row (question answering)."""
    if (masked := scope.fully_masked()) is None:
        return out_bhqd
    return torch.where(masked, repeat_groups(scope.mean(v_bgkd), out_bhqd.shape[1]), out_bhqd)


def _one_query(q_bhqd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, scope: Scope, kernel: Kernel) -> Tensor:
    """The heads of a group become queries of one key/value head: no key or value is repeated."""
    b, h, _, d = q_bhqd.shape
    g, keys = k_bgkd.shape[1], k_bgkd.shape[2]
    bias = scope.memo.get("one_query")
    if bias is None:
        bias = scope.memo["one_query"] = scope.bias(0, 1, 0, keys, mask_dtype(q_bhqd.dtype, q_bhqd.device))
    rows = bias.reshape(bias.shape[0], g, h // g, keys) if bias.shape[1] == h else bias
    out = F.scaled_dot_product_attention(
        q_bhqd.reshape(b, g, h // g, d),
        k_bgkd,
        v_bgkd,
        attn_mask=rows,
        dropout_p=kernel.dropout,
        scale=kernel.scale,
    )
    return out.reshape(b, h, 1, d)


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, causal: bool, scale: float) -> Tensor:
    """PyTorch's CPU flash kernel, called directly: the public function refuses a bias together with is_causal."""
    # With float64 queries it would silently reinterpret a float32 bias as float64.
    bias = bias.to(mask_dtype(q.dtype, q.device)).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias, scale=scale
    )
    return out


def _by_blocks(q_bhqd: Tensor, k_bhkd: Tensor, v_bhkd: Tensor, scope: Scope, kernel: Kernel) -> Tensor:
    def block(start: int, stop: int) -> Tensor:
        first, last = scope.keys_of(start, stop)
        q, k, v = q_bhqd[:, :, start:stop], k_bhkd[:, :, first:last], v_bhkd[:, :, first:last]
        bias = scope.bias(start, stop, first, last, mask_dtype(q.dtype, q.device))
        if kernel.softcap is not None:
            return _weights(q, k, bias, kernel).to(v.dtype) @ v
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=kernel.dropout, scale=kernel.scale
        )

    length = q_bhqd.shape[2]
    training = torch.is_grad_enabled() and q_bhqd.requires_grad and length > QUERY_BLOCK
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        if training:
            blocks.append(checkpoint(block, start, stop, use_reentrant=False))
        else:
            blocks.append(block(start, stop))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def attend_eager(
    q_bhqd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, scope: Scope, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """Attention by its formula, scores and softmax in fp32; the output and the weights (b, h, q, k) after dropout."""
    k_bhkd, v_bhkd = repeat_groups(k_bgkd, q_bhqd.shape[1]), repeat_groups(v_bgkd, q_bhqd.shape[1])
    bias = scope.bias(0, None, 0, None, torch.float32)
    weights = _weights(q_bhqd, k_bhkd, bias, kernel).to(v_bhkd.dtype)
    if (masked := scope.fully_masked()) is not None:
        # Explicitly, so that masked scores get no gradient.
        weights = torch.where(masked, scope.equal_weights(weights.dtype), weights)
    return weights @ v_bhkd, weights


def _weights(q_bhqd: Tensor, k_bhkd: Tensor, bias: Tensor, kernel: Kernel) -> Tensor:
    exact = torch.promote_types(q_bhqd.dtype, torch.float32)
    scores = (q_bhqd.to(exact) @ k_bhkd.to(exact).mT) * kernel.scale
    if kernel.softcap is not None:
        scores = kernel.softcap * torch.tanh(scores / kernel.softcap)
    weights = (scores + bias).softmax(dim=-1)
    return F.dropout(weights, kernel.dropout) if kernel.dropout else weights


def mask_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """float32 where the fused kernel takes it with narrower queries (CPU), else the queries' dtype."""
    return torch.float32 if device.type == "cpu" and dtype != torch.float64 else dtype


# ---------------------------------------------------------------------------- other implementations


def attend_flex(q_bhqd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, scope: Scope, kernel: Kernel) -> Tensor:
    """PyTorch's flex attention, compiled. A single query goes to `attend`, as it would not gain. So do
    transformed calls, and explicit masks, whose block structure is unknown."""
    if q_bhqd.shape[2] == 1 or dispatch.transformed() or scope.given is not None:
        return attend(q_bhqd, k_bgkd, v_bgkd, scope, kernel)
    return fill_fully_masked(attention_flex.attend(q_bhqd, k_bgkd, v_bgkd, scope, kernel), v_bgkd, scope)


def attend_flash2(q_bhqd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, scope: Scope, kernel: Kernel) -> Tensor:
    """The flash-attn package (GPU, fp16 or bf16). Padding, packed documents and relative
    position buckets, which it does not support, go to `attend`."""
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    if any(x is not None for x in (scope.valid_bk, scope.segment_bk, scope.relative, scope.given)):
        return attend(q_bhqd, k_bgkd, v_bgkd, scope, kernel)
    span = (-1, -1) if scope.window is None else (scope.window - 1, 0)
    out = flash_attn_func(
        *(x.transpose(1, 2) for x in (q_bhqd, k_bgkd, v_bgkd)),
        dropout_p=kernel.dropout,
        softmax_scale=kernel.scale,
        causal=scope.causal,
        window_size=span,
        softcap=kernel.softcap or 0.0,
        alibi_slopes=None if scope.slopes_h is None else scope.slopes_h.float(),
    )
    return out.transpose(1, 2)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Scope, Kernel], Tensor]] = {
    "eager": lambda q, k, v, scope, kernel: attend_eager(q, k, v, scope, kernel)[0],
    "sdpa": attend,
    "flex_attention": attend_flex,
    "flash_attention_2": attend_flash2,
}


def implementation(name: str | None) -> str:
    """A checked `attn_implementation`; None is sdpa. ValueError: unknown. ImportError: a GPU or package is missing."""
    name = name or "sdpa"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attn_implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {name!r}")
    if name == "flash_attention_2":
        if not torch.cuda.is_available():
            raise ImportError(
                "attn_implementation='flash_attention_2' needs a CUDA GPU; use 'sdpa' on this machine"
            )
        if importlib.util.find_spec("flash_attn") is None:
            raise ImportError(
                "attn_implementation='flash_attention_2' needs a package: pip install flash-attn"
            )
    return name
