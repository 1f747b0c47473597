"""Attention on CUDA: the choice of PyTorch's fused kernels, and the transformations of tensors that they need.

    one new token                            memory-efficient kernel with a mask, the keys in splits (flash decoding)
    a prompt, 16 bits, causal or not         flash kernel, grouped heads as they are
    the same with ALiBi or padding           flash kernel, the bias in eight additional channels
    fp32, windows, packed rows, chunks       `None`: attention.py's blocks of queries, each with its own mask
    dropout, softcap                         `None`

No kernel is compiled. `attn_implementation="flex_attention"` (attention_flex.py) compiles one kernel for windows,
softcaps and ALiBi alike.

Shape suffixes: b batch, q queries, k keys, h heads, g key/value heads, r heads of a group, n splits, d head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from monoblock.backends.pytorch.ops import Kernel, Scope

DEVICES = ("cuda",)
WIDEST = 256  # channels of a head that the flash kernel takes
EXTRA = 8  # channels that carry a bias
BASE = 128  # base of the digits of a position: digits, and 128 times digits, are exact in bf16
PADDING = 8192.0  # its square, times any usual scale, is far below every score
FINEST_SCALE = 1 / 256  # smallest scale of scores for which the above holds and fp16 does not overflow

# The keys of one query are divided among at least BLOCKS thread blocks, if each gets FEWEST_KEYS keys or more.
BLOCKS, FEWEST_KEYS = 128, 128


def attend(q_bhqd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, scope: Scope, kernel: Kernel) -> Tensor | None:
    """(b, h, q, d), or None where no kernel of this file fits. The output of fully masked queries is arbitrary."""
    if kernel.dropout or kernel.softcap is not None:
        return None
    if q_bhqd.shape[2] == 1:
        return one_query(q_bhqd, k_bgkd, v_bgkd, scope, kernel.scale)
    if not (scope.aligned and scope.by_key and q_bhqd.dtype in (torch.float16, torch.bfloat16)):
        return None
    width, biased = q_bhqd.shape[3], scope.slopes_h is not None or scope.valid_bk is not None
    if width + EXTRA * biased > WIDEST or (biased and kernel.scale < FINEST_SCALE):
        return None
    if biased:
        more_q, more_k = bias_channels(scope, kernel.scale, q_bhqd, k_bgkd)
        q_bhqd, k_bgkd = torch.cat((q_bhqd, more_q), dim=-1), torch.cat((k_bgkd, more_k), dim=-1)
        v_bgkd = F.pad(v_bgkd, (0, EXTRA))
    shared = q_bhqd.shape[1] // k_bgkd.shape[1]
    if shared > 1 and not has_flash(q_bhqd.device):
        # The fallback kernel has no grouped heads.
        k_bgkd, v_bgkd, shared = (*(x.repeat_interleave(shared, dim=1) for x in (k_bgkd, v_bgkd)), 1)
    out = F.scaled_dot_product_attention(
        q_bhqd, k_bgkd, v_bgkd, is_causal=scope.causal, scale=kernel.scale, enable_gqa=shared > 1
    )
    return out[..., :width]


@functools.cache
def has_flash(device: torch.device) -> bool:
    """Whether PyTorch's flash kernel runs there: GPUs of compute capability 8.0 (Ampere) and later."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def bias_channels(scope: Scope, scale: float, q_bhqd: Tensor, k_bgkd: Tensor) -> tuple[Tensor, Tensor]:
    """Channels whose product, times `scale`, is ALiBi's slope times the key's position, and very low for padding.

    Softmax is invariant to a constant per query, so the query's own position is not needed. A position is split into
    three digits to base 128, and a slope into a sum of two numbers of the heads' dtype, so that 16 bits lose nothing.
    """
    dtype = q_bhqd.dtype
    index = scope.index_k
    digits = torch.stack([index % BASE, index // BASE % BASE * BASE, index // BASE**2 % BASE * BASE], dim=-1)
    keys = torch.zeros(*k_bgkd.shape[:3], EXTRA, dtype=dtype, device=index.device)
    queries = torch.zeros(*q_bhqd.shape[:3], EXTRA, dtype=dtype, device=index.device)
    if scope.slopes_h is not None:
        slope = scope.slopes_h.float()[:, None] / scale
        high = slope.to(dtype)
        low = (slope - high.float()).to(dtype)
        keys[..., :3] = keys[..., 3:6] = digits.to(dtype)
        factors = high.new_ones(3)
        factors[2] = BASE  # the highest digit is stored divided by 128: a position may exceed fp16's maximum
        queries[..., :3] = (high * factors)[:, None]
        queries[..., 3:6] = (low * factors)[:, None]
    if scope.valid_bk is not None:
        keys[..., 6] = (~scope.valid_bk[:, None]).to(dtype) * -PADDING
        queries[..., 6] = PADDING
    return queries, keys


def one_query(q_bhqd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, scope: Scope, scale: float) -> Tensor:
    """One query for each head, (b, h, 1, d). The heads of a group become queries of one key/value head; contiguous keys
    are read in splits, to use more multiprocessors than there are key/value heads."""
    b, h, _, d = q_bhqd.shape
    g, keys = k_bgkd.shape[1], k_bgkd.shape[2]
    q_bgrd = q_bhqd.reshape(b, g, h // g, d)
    # Requirements of the kernel that the public function would ensure.
    fits = k_bgkd.is_contiguous() and v_bgkd.is_contiguous() and d * q_bhqd.element_size() % 16 == 0
    n = kv_splits(b * g, keys) if fits else 1
    if (bias := scope.memo.get(f"{n} splits")) is None:
        whole = scope.bias(0, 1, 0, keys, q_bhqd.dtype).expand(b, h, 1, keys)
        parts = whole.reshape(b, g, h // g, n, keys // n).transpose(2, 3)
        bias = scope.memo[f"{n} splits"] = parts.flatten(1, 2).contiguous()
    if n == 1:
        out = F.scaled_dot_product_attention(q_bgrd, k_bgkd, v_bgkd, attn_mask=bias, scale=scale)
        return out.reshape(b, h, 1, d)
    # Each split becomes a separate key/value head.
    out, logs = PARTIAL[q_bhqd.device.type](
        q_bgrd.repeat_interleave(n, dim=1),
        k_bgkd.reshape(b, g * n, keys // n, d),
        v_bgkd.reshape(b, g * n, keys // n, d),
        bias,
        scale,
    )
    share_bgnr = logs[..., : h // g].unflatten(1, (g, n)).softmax(dim=2)
    whole = (out.float().unflatten(1, (g, n)) * share_bgnr[..., None]).sum(dim=2)
    return whole.to(q_bhqd.dtype).reshape(b, h, 1, d)


def kv_splits(heads: int, keys: int) -> int:
    """The number of splits of the keys: a power of two that divides them and keeps masks aligned."""
    count = 1
    while heads * count < BLOCKS and keys // (2 * count) >= FEWEST_KEYS and keys % (32 * count) == 0:
        count *= 2
    return count


def _partial_cuda(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, logs, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, True, 0.0, False, scale=scale
    )
    return out, logs


def _partial_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=bias, scale=scale
    )


# Attention over a split, and the log-sum-exp of its scores (b, heads, queries or more).
Partial = Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
PARTIAL: dict[str, Partial] = {"cuda": _partial_cuda, "cpu": _partial_cpu}
