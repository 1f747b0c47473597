"""PyTorch's flex attention, compiled: masks, ALiBi and softcap in one kernel, which skips blocks of keys that are
masked for all queries of a block.

Shape suffixes: b batch, q queries, k keys, h heads, g key/value heads, d head width; m blocks of queries, n of keys.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from monoblock.backends.pytorch.ops import Kernel, Scope

BLOCK = 128  # queries and keys of a block: the kernels' default

Mod = Callable[..., Tensor]


def attend(q_bhqd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, scope: Scope, kernel: Kernel) -> Tensor:
    """(b, h, q, d); ValueError for unsupported options. The output of fully masked queries is 0."""
    if kernel.dropout:
        raise ValueError(
            "flex_attention has no attention dropout: set it to 0 or use attn_implementation='sdpa'"
        )
    if scope.relative is not None:
        raise ValueError(
            "flex_attention has no relative position buckets here: use attn_implementation='sdpa'"
        )
    if "flex" not in scope.memo:
        backward = torch.is_grad_enabled() and q_bhqd.requires_grad
        scope.memo["flex"] = block_mask(scope, backward=backward)
    return _flex(q_bhqd.device.type)(
        q_bhqd,
        k_bgkd,
        v_bgkd,
        score_mod=_score(scope, kernel, q_bhqd.device),
        block_mask=scope.memo["flex"],
        scale=kernel.scale,
        enable_gqa=q_bhqd.shape[1] != k_bgkd.shape[1],
    )


def _score(scope: Scope, kernel: Kernel, device: torch.device) -> Mod | None:
    """The score_mod: softcap and ALiBi; None if there is neither."""
    slopes, index_q, index_k = scope.slopes_h, scope.index_q, scope.index_k
    if kernel.softcap is None and slopes is None:
        return None
    # A tensor, since PyTorch 2.13 cannot compile a Python number that it makes symbolic.
    cap = None if kernel.softcap is None else torch.tensor(kernel.softcap, device=device)

    def score(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        del b
        if cap is not None:
            s = cap * torch.tanh(s / cap)
        if slopes is not None:
            s = s + slopes[h] * (index_k[k] - index_q[q])
        return s

    return score


def _visible(scope: Scope) -> Mod:
    """The mask_mod: which keys are visible to each query, by array index."""

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        del h
        distance = scope.index_q[q] - scope.index_k[k]
        inside = distance >= 0 if scope.causal else distance == distance
        if scope.window is not None:
            inside = inside & (distance < scope.window)
        if scope.valid_bk is not None:
            inside = inside & scope.valid_bk[b, k]
        if scope.segment_bk is not None:
            own = scope.segment_bk[b, scope.index_q[q] - scope.index_k[0]]
            inside = inside & (own == scope.segment_bk[b, k])
        return inside

    return visible


def block_mask(scope: Scope, *, backward: bool) -> Any:
    """The BlockMask: fully and partly visible blocks, with `_visible` for the latter.

    Computed from the blocks' end points, never from an array of queries x keys. `backward`: also for gradients.
    """
    from torch.nn.attention.flex_attention import BlockMask

    some, full = blocks(scope)
    arrays = []
    for chosen in (some & ~full, full):
        order = chosen.int().argsort(dim=-1, descending=True, stable=True)
        arrays += [chosen.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]]
    return BlockMask.from_kv_blocks(
        *arrays,
        BLOCK_SIZE=BLOCK,
        mask_mod=_visible(scope),
        seq_lengths=(scope.index_q.shape[0], scope.index_k.shape[0]),
        **({} if not _q_blocks_are_optional() else {"compute_q_blocks": backward}),
    )


@functools.cache
def _q_blocks_are_optional() -> bool:
    """PyTorch before 2.9 always computes the blocks of queries, which only the backward pass needs."""
    from torch.nn.attention.flex_attention import BlockMask

    return "compute_q_blocks" in inspect.signature(BlockMask.from_kv_blocks).parameters


def blocks(scope: Scope) -> tuple[Tensor, Tensor]:
    """(b or 1, m, n) whether some query may attend to some key of a block, and whether all attend to all."""
    (q0, q1, whole_q), (k0, k1, whole_k) = _ends(scope.index_q), _ends(scope.index_k)
    full = whole_q[:, None] & whole_k[None]  # incomplete blocks are never full
    some = torch.ones_like(full)
    if scope.causal:
        some, full = some & (k0[None] <= q1[:, None]), full & (k1[None] <= q0[:, None])
    if scope.window is not None:
        some = some & (k1[None] > q0[:, None] - scope.window)
        full = full & (k0[None] > q1[:, None] - scope.window)
    some, full = some[None], full[None]
    if scope.segment_bk is not None:
        full = torch.zeros_like(full)
    if scope.valid_bk is not None:
        valid = F.pad(scope.valid_bk, (0, -scope.valid_bk.shape[1] % BLOCK)).unflatten(-1, (-1, BLOCK))
        some, full = some & valid.any(-1)[:, None], full & valid.all(-1)[:, None]
    return some, full


def _ends(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first and the last index of each block, and whether it is complete."""
    count = -(-index.shape[0] // BLOCK)
    start = torch.arange(count, device=index.device) * BLOCK
    last = (start + BLOCK - 1).clamp(max=index.shape[0] - 1)
    return index[start], index[last], start + BLOCK <= index.shape[0]


@functools.cache
def _flex(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # On CPUs PyTorch 2.13 generates invalid C++ for symbolic lengths, so each length is compiled separately.
    return torch.compile(flex_attention, dynamic=device != "cpu")
