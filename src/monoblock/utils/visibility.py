"""The attention mask and bias of an `ArchSpec`, in NumPy: the reference for what every backend's attention computes.

Shape suffixes: b batch, h heads, q queries, k keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monoblock.positions import relative_position_bucket
from monoblock.spec import Alibi, ArchSpec, Buckets

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Batch:
    """Rows of one length: `valid_bk` is False for padding, `segment_bk` the index of each token's packed sequence."""

    valid_bk: Bools
    segment_bk: Ints | None = None


def visible(batch: Batch, *, causal: bool, window: int | None) -> Bools:
    """(b, q, k): `valid_k & (k <= q or not causal) & (q - k < window)`, and within a segment if there are any."""
    distance = _distance(batch.valid_bk.shape[1])
    visible_bqk = batch.valid_bk[:, None, :] & ((distance <= 0) | (not causal))
    if window is not None:
        visible_bqk &= -distance < window
    if batch.segment_bk is not None:
        visible_bqk &= batch.segment_bk[:, :, None] == batch.segment_bk[:, None, :]
    return visible_bqk


def mask(spec: ArchSpec, layer: int, batch: Batch) -> Bools:
    """The attention mask of `layer`, (b, q, k)."""
    return visible(batch, causal=spec.causal, window=spec.windows[layer])


def bias(spec: ArchSpec, layer: int, batch: Batch, table: Any = None) -> Floats:
    """The bias that `layer` adds to its scores, (b, h or 1, q, k): 0, ALiBi or that of relative buckets; the lowest
    float32 where a key is masked.

    Args:
        table: the learned bias of relative buckets (buckets, heads); required for a model that has them.
    """
    visible_bqk, distance = mask(spec, layer, batch), _distance(batch.valid_bk.shape[1])
    added = np.zeros((1, *distance.shape), np.float32)
    if alibi := spec.position(Alibi):
        slopes = np.asarray(alibi.slopes(spec.attention.heads), np.float32)
        added = slopes[:, None, None] * distance.astype(np.float32)
    if layout := spec.position(Buckets):
        added = _bucket_bias(layout, spec.attention.heads, table, distance)
    elif table is not None:
        raise ValueError("table would have no effect: the model has no relative position buckets")
    return np.where(visible_bqk[:, None], added[None], np.float32(LOWEST))


def _bucket_bias(layout: Buckets, heads: int, table: Any, distance: Ints) -> Floats:
    expected = (layout.count, heads)
    if table is None:
        raise ValueError(
            f"the bias of relative buckets is learned: pass the model's table {expected}, as in bias(layer, "
            "table=model.backbone.rel_bias.weight.detach().numpy()); the buckets alone need no weights: buckets()"
        )
    rows = np.asarray(table, np.float32)
    if rows.shape != expected:
        raise ValueError(f"table must be (buckets, heads) = {expected}, got {rows.shape}")
    return rows[relative_position_bucket(distance, layout)].transpose(2, 0, 1)


def _distance(length: int) -> Ints:
    index = np.arange(length)
    return index[None, :] - index[:, None]


# ---------------------------------------------------------------------------- shades for pictures


def strength(spec: ArchSpec, length: int, head: int | None = None) -> Floats:
    """The relative strength of a key, (q, k) in 0..1: ALiBi's factor of its weight, the nearness of its bucket, or 1.

    `head`: the head of ALiBi; None is the mean of all heads.
    """
    distance = np.arange(-length + 1, length)
    if alibi := spec.position(Alibi):
        slopes = np.asarray(alibi.slopes(spec.attention.heads))
        slopes = slopes if head is None else slopes[head : head + 1]
        by_distance = np.exp(slopes[:, None] * np.minimum(distance, 0)).mean(axis=0)
    elif layout := spec.position(Buckets):
        half = layout.count // 2
        by_distance = 1 - relative_position_bucket(distance, layout) % half / (half - 1)
    else:
        by_distance = np.ones(distance.shape)
    return by_distance.astype(np.float32)[_distance(length) + length - 1]


def layer_kinds(spec: ArchSpec) -> dict[int | None, list[int]]:
    """The layers with the same mask: window -> layer indices, in the order of their first layers."""
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(spec.windows):
        kinds.setdefault(window, []).append(layer)
    return kinds
