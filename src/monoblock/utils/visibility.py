"""Which tokens may see which, from an `ArchSpec` alone, in NumPy: what every backend's attention computes.

Shape suffixes: b batch, h heads, q queries, k keys. A query is the token that looks, a key one that is looked at.
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
    """Rows of one length: `valid_bk` is False for padding, `segment_bk` numbers the parts of packed rows."""

    valid_bk: Bools
    segment_bk: Ints | None = None


def visible(batch: Batch, *, causal: bool, window: int | None) -> Bools:
    """(b, q, k): `valid_k & (k <= q or not causal) & (q - k < window)`, within a segment where there are any."""
    distance = _distance(batch.valid_bk.shape[1])
    seen = batch.valid_bk[:, None, :] & ((distance <= 0) | (not causal))
    if window is not None:
        seen &= -distance < window
    if batch.segment_bk is not None:
        seen &= batch.segment_bk[:, :, None] == batch.segment_bk[:, None, :]
    return seen


def mask(spec: ArchSpec, layer: int, batch: Batch) -> Bools:
    """What `layer` lets see, (b, q, k)."""
    return visible(batch, causal=spec.causal, window=spec.windows[layer])


def bias(spec: ArchSpec, layer: int, batch: Batch, table: Any = None) -> Floats:
    """What `layer` adds to its scores, (b, h or 1, q, k): 0, ALiBi or the buckets' bias; the lowest float32 where a
    key may not be seen.

    Args:
        table: the learned bias of relative buckets (buckets, heads); needed by a model that has them.
    """
    seen, distance = mask(spec, layer, batch), _distance(batch.valid_bk.shape[1])
    added = np.zeros((1, *distance.shape), np.float32)
    if alibi := spec.position(Alibi):
        slopes = np.asarray(alibi.slopes(spec.attention.heads), np.float32)
        added = slopes[:, None, None] * distance.astype(np.float32)
    if layout := spec.position(Buckets):
        added = _bucket_bias(layout, spec.attention.heads, table, distance)
    elif table is not None:
        raise ValueError("table would have no effect: the model has no relative position buckets")
    return np.where(seen[:, None], added[None], np.float32(LOWEST))


def _bucket_bias(layout: Buckets, heads: int, table: Any, distance: Ints) -> Floats:
    expected = (layout.count, heads)
    if table is None:
        raise ValueError(
            f"the bias of relative buckets is learned: give the model's table {expected}, as in bias(layer, "
            "table=model.backbone.rel_bias.weight.detach().numpy()); which bucket is where needs no weights: buckets()"
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
    """How near a key counts, (q, k) in 0..1: what ALiBi multiplies a weight by, or the nearness of the bucket, else 1.

    `head`: whose ALiBi; None is the mean of all.
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
    """The layers that share a mask: window -> their numbers, in the order of their first layers."""
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(spec.windows):
        kinds.setdefault(window, []).append(layer)
    return kinds
