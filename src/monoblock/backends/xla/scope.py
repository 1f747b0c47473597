"""The attention mask, computed from indices.

Shape suffixes: b batch, q queries, k keys, h heads, g key/value heads, d head width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Self

from monoblock.backends.xla.namespace import Array, Namespace, Size


class ScopeBase:
    """The keys that each query may attend to: `valid_k & (k <= q or not causal) & (q - k < window)`, within one
    segment.

    `index_q` (q,) and `index_k` (k,) are indices in the sequence, negative for empty slots; `valid_bk` is False for
    padding (None: there is none); `segment_bq` and `segment_bk` number the documents of a packed row (None: one).
    `aligned`: queries and keys are the same tokens. `masked_rows`: as in the spec. Each framework's class is a
    dataclass with these fields, and the functions `xp`.
    """

    xp: ClassVar[Namespace]
    index_q: Array
    index_k: Array
    valid_bk: Array | None
    segment_bq: Array | None
    segment_bk: Array | None
    causal: bool
    aligned: bool
    window: int | None
    masked_rows: str

    def of_keys(self, index_k: Array) -> Self:
        """The mask over cached keys, given their indices in the sequence; negative for empty slots."""

        def gathered(x_bk: Array | None) -> Array | None:
            return None if x_bk is None else self.xp.gather(x_bk, self.xp.maximum(index_k, 0))

        changes: dict[str, Any] = {
            "valid_bk": gathered(self.valid_bk),
            "segment_bk": gathered(self.segment_bk),
        }
        return replace(self, index_k=index_k, aligned=False, **changes)  # pyright: ignore[reportArgumentType]

    def block(self, first_q: Any, queries: Size, first_k: Any, keys: Size) -> Self:
        """The mask of a block of queries and a block of keys, whose starts may be traced."""

        def cut(x: Array | None, first: Any, count: Size) -> Array | None:
            return None if x is None else self.xp.cut(x, first, count)

        changes: dict[str, Any] = {
            "index_q": cut(self.index_q, first_q, queries),
            "index_k": cut(self.index_k, first_k, keys),
            "valid_bk": cut(self.valid_bk, first_k, keys),
            "segment_bq": cut(self.segment_bq, first_q, queries),
            "segment_bk": cut(self.segment_bk, first_k, keys),
        }
        return replace(self, **changes)  # pyright: ignore[reportArgumentType]

    @property
    def all_visible(self) -> bool:
        """Whether every query may attend to every key."""
        unmasked = self.aligned and not self.causal and self.window is None
        return unmasked and self.valid_bk is None and self.segment_bk is None

    def visible(self) -> Array:
        """(b or 1, 1, q or 1, k), True where the query may attend to the key."""
        distance = self.index_q[:, None] - self.index_k[None, :]
        visible = (self.index_k >= 0)[None]
        if self.causal:
            visible = visible & (distance >= 0)
        if self.window is not None:
            visible = visible & (distance < self.window)
        visible = visible[None, None]
        if self.valid_bk is not None:
            visible = visible & self.valid_bk[:, None, None, :]
        if self.segment_bq is not None and self.segment_bk is not None:
            visible = visible & (self.segment_bq[:, None, :, None] == self.segment_bk[:, None, None, :])
        return visible

    def fully_masked(self) -> Array | None:
        """(b, 1, q, 1), True for queries whose keys are all masked: before a row's first real token, or with only
        padding in their window. None if there can be none, or if queries and keys are not the same tokens."""
        if self.valid_bk is None or not self.causal or not self.aligned:
            return None
        count = self.xp.cumsum(self.xp.int32(self.valid_bk))
        if self.window is not None:
            count = count - self.xp.shifted(count, self.window, 1)
        return (count == 0)[:, None, :, None]

    def mean(self, v_bgkd: Array) -> Array:
        """(b, g, 1 or q, d): the output of fully masked queries, the mean of the values that `masked_rows` selects.
        Computed by sums along the keys, without an array of queries x keys; queries and keys are the same tokens."""
        xp, dtype = self.xp, v_bgkd.dtype
        if self.masked_rows == "all" or self.valid_bk is None:
            return xp.mean(v_bgkd, 2)
        wide = v_bgkd if dtype.name == "float64" else xp.cast(v_bgkd, "float32")
        real = xp.cast(self.valid_bk, wide.dtype)
        real_values = wide * real[:, None, :, None]
        if self.masked_rows == "valid":
            count = xp.sum(real, 1)[:, :, None, None]
            total = xp.sum(real_values, 2) / xp.maximum(count, 1)
            return xp.cast(xp.where(count > 0, total, xp.mean(wide, 2)), dtype)
        cumulative, count = xp.cumsum(wide, 2), xp.arange(xp.size(v_bgkd, 2)) + 1
        if self.window is not None:
            cumulative, count = (
                cumulative - xp.shifted(cumulative, self.window, 2),
                xp.minimum(count, self.window),
            )
        weights = xp.cumsum(real) + xp.cast(count, wide.dtype)
        return xp.cast((cumulative + xp.cumsum(real_values, 2)) / weights[:, None, :, None], dtype)

    def equal_weights(self) -> Array:
        """(b or 1, 1, 1 or q, k): the attention weights of fully masked queries (those of `mean`), in float32."""
        xp = self.xp
        if self.masked_rows == "all" or self.valid_bk is None:
            chosen = (self.index_k == self.index_k)[None, None, None]
        else:
            real = self.valid_bk[:, None, None]
            distance = (self.index_q[:, None] - self.index_k)[None, None]
            if self.masked_rows == "valid":
                chosen = real | (xp.sum(xp.int32(real), -1) == 0)
            elif self.window is None:
                chosen = distance >= 0
            else:
                chosen = (distance >= 0) & (real | (distance < self.window))
        chosen = xp.cast(chosen, "float32")
        return chosen / xp.sum(chosen, -1)
