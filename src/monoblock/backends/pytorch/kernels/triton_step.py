"""Attention of one new token per row over a cache, from projected q, k and v to the output, in three Triton kernels.

    _write     applies RoPE to queries and keys, and stores keys and values in their slots
    _partial   attention over one split of the slots: its output, and the log of the sum of its weights
    _combine   the outputs of the splits, weighted (flash decoding)

PyTorch's operators take about twenty kernels per layer for the same, and each captured kernel costs one or two
microseconds however small it is. The position that a slot holds, and the queries that attend to it, follow from the
token's position as in static_step.py; ALiBi's bias and the softcap of scores are in float32. Block sizes are
not tuned.
"""

# Triton's types know neither the grid and the options of a launch nor `static_range`.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

KEYS = 64  # keys of a block
QUERIES = 16  # minimum of the tensor cores; a group with fewer heads is padded with zeros


@triton.jit
def _write(
    q_ptr,
    k_ptr,
    v_ptr,
    rotated_ptr,
    keys_ptr,
    values_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    q_row,
    k_row,
    v_row,
    angle_row,
    slots,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One of the H query, G key or G value heads of one row. Queries and keys are rotated in the first ROTARY channels.
    Heads are contiguous; rows have strides."""
    row, head = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, WIDTH)
    real = c < D
    slot = tl.load(position_ptr) % slots
    if head < H:
        at = q_ptr + row * q_row + head * D
        to = rotated_ptr + (row * H + head) * D + c
    elif head < H + G:
        at = k_ptr + row * k_row + (head - H) * D
        to = keys_ptr + ((row * G + head - H).to(tl.int64) * slots + slot) * D + c
    else:
        at = v_ptr + row * v_row + (head - H - G) * D
        to = values_ptr + ((row * G + head - H - G).to(tl.int64) * slots + slot) * D + c
    x = tl.load(at + c, mask=real, other=0.0).to(tl.float32)
    if ROTARY > 0:
        half = ROTARY // 2
        rotates = c < tl.where(head < H + G, ROTARY, 0)  # values are not
        partner = tl.where(c < half, c + half, c - half)
        other = tl.load(at + partner, mask=rotates, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + row * angle_row + c, mask=rotates, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + row * angle_row + c, mask=rotates, other=0.0).to(tl.float32)
        x = x * cos + tl.where(c < half, -other, other) * sin
    tl.store(to, x.to(to.dtype.element_ty), mask=real)


@triton.jit
def _partial(
    rotated_ptr,
    keys_ptr,
    values_ptr,
    slopes_ptr,
    valid_ptr,
    position_ptr,
    out_ptr,
    log_ptr,
    scale,
    softcap,
    slots,
    split_size,
    window,
    length,
    R: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    ALIBI: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PADDED: tl.constexpr,
):
    """The R queries of a group over one split of its slots."""
    group, part = tl.program_id(0), tl.program_id(1)
    row, first = group // G, (group % G) * R
    r, c = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    queries = (r[:, None] < R) & (c[None, :] < D)
    q = tl.load(rotated_ptr + (group * R + r[:, None]) * D + c[None, :], mask=queries, other=0.0)
    position = tl.load(position_ptr)
    slope = tl.zeros((QUERIES,), dtype=tl.float32)
    if ALIBI:
        slope = tl.load(slopes_ptr + first + r, mask=r < R, other=0.0)
    highest = tl.full((QUERIES,), -1e30, dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    out = tl.zeros((QUERIES, WIDTH), dtype=tl.float32)
    for start in range(0, split_size, KEYS):
        slot = part * split_size + start + tl.arange(0, KEYS)
        behind = (position - slot) % slots  # of both signs
        behind = tl.where(behind < 0, behind + slots, behind)
        there = (slot < slots) & (start + tl.arange(0, KEYS) < split_size)
        visible = there & (behind <= position)
        if WINDOWED:
            visible = visible & (behind < window)
        if PADDED:
            visible = visible & (
                tl.load(valid_ptr + row * length + position - behind, mask=visible, other=0) != 0
            )
        at = (group.to(tl.int64) * slots + slot[:, None]) * D + c[None, :]
        k = tl.load(keys_ptr + at, mask=there[:, None] & (c[None, :] < D), other=0.0)
        v = tl.load(values_ptr + at, mask=there[:, None] & (c[None, :] < D), other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if CAPPED:
            scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)  # the hyperbolic tangent
        if ALIBI:
            scores = scores - slope[:, None] * behind[None, :].to(tl.float32)
        scores = tl.where(visible[None, :], scores, -1e30)
        above = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.where(visible[None, :], tl.exp(scores - above[:, None]), 0.0)
        shrunk = tl.exp(highest - above)
        total = total * shrunk + tl.sum(weights, axis=1)
        out = out * shrunk[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        highest = above
    # A fully masked split has a weight of 0.
    some = tl.maximum(total, 1e-37)
    splits = tl.num_programs(1)
    to = (group * R + r) * splits + part
    tl.store(log_ptr + to, highest + tl.log(some), mask=r < R)
    tl.store(out_ptr + to[:, None] * D + c[None, :], out / some[:, None], mask=queries)


@triton.jit
def _combine(out_ptr, log_ptr, y_ptr, splits, D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """One head of one row."""
    head = tl.program_id(0)
    n, c = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    logs = tl.load(log_ptr + head * splits + n, mask=n < splits, other=-1e30)
    weights = tl.exp(logs - tl.max(logs, axis=0))
    weights = tl.where(n < splits, weights, 0.0)
    real = (n[:, None] < splits) & (c[None, :] < D)
    out = tl.load(out_ptr + (head * splits + n[:, None]) * D + c[None, :], mask=real, other=0.0)
    y = tl.sum(out * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    tl.store(y_ptr + head * D + c, y.to(y_ptr.dtype.element_ty), mask=c < D)


def attention(
    q_bhsd: Tensor,
    k_bgsd: Tensor,
    v_bgsd: Tensor,
    keys_bgkd: Tensor,
    values_bgkd: Tensor,
    position_1: Tensor,
    *,
    angles: tuple[Tensor, Tensor] | None,
    slopes_h: Tensor | None,
    valid_bl: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    splits: int,
) -> Tensor:
    """Attention output (b, 1, h * d) of one token (s = 1); stores its keys and values in their slots. The heads of a
    row are contiguous in q, k and v; `angles` are cos and sin (b or 1, 1, 1, channels); `valid_bl` is False for
    padding."""
    b, h, _, d = q_bhsd.shape
    g, slots = keys_bgkd.shape[1], keys_bgkd.shape[2]
    width = max(16, triton.next_power_of_2(d))
    rotated = q_bhsd.new_empty(b, h, d)
    cos, sin = angles or (rotated, rotated)
    q, k, v = (_by_head(x) for x in (q_bhsd, k_bgsd, v_bgsd))
    _write[(b, h + 2 * g)](
        *(q, k, v, rotated, keys_bgkd, values_bgkd, cos, sin, position_1),
        *(q.stride(0), k.stride(0), v.stride(0), 0 if cos.shape[0] == 1 else cos.stride(0), slots),
        H=h,
        G=g,
        D=d,
        ROTARY=cos.shape[-1] if angles else 0,
        WIDTH=width,
        num_warps=1,
    )
    out = rotated.new_empty(b * h, splits, d, dtype=torch.float32)
    logs = rotated.new_empty(b * h, splits, dtype=torch.float32)
    _partial[(b * g, splits)](
        *(rotated, keys_bgkd, values_bgkd),
        # Placeholders: not read if the tensor is absent.
        position_1 if slopes_h is None else slopes_h,
        position_1 if valid_bl is None else valid_bl,
        *(position_1, out, logs, scale, softcap or 1.0, slots, slots // splits, window or 0),
        0 if valid_bl is None else valid_bl.shape[1],
        R=h // g,
        G=g,
        D=d,
        WIDTH=width,
        KEYS=KEYS,
        QUERIES=max(QUERIES, triton.next_power_of_2(h // g)),
        ALIBI=slopes_h is not None,
        CAPPED=softcap is not None,
        WINDOWED=window is not None,
        PADDED=valid_bl is not None,
        num_warps=4,
    )
    y = rotated.new_empty(b, 1, h * d)
    _combine[(b * h,)](
        out, logs, y, splits, D=d, WIDTH=width, SPLITS=triton.next_power_of_2(splits), num_warps=1
    )
    return y


def _by_head(x_bhsd: Tensor) -> Tensor:
    """(b, heads * d), heads concatenated."""
    return x_bhsd.transpose(1, 2).flatten(1)
