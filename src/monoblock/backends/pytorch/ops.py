"""Pure functions on PyTorch tensors: activations, RoPE, relative position buckets; and `Scope`, the attention mask.

Shape suffixes: b batch, q queries, k keys, h heads, d head width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from monoblock.backends.pytorch.kernels import dispatch, native_ops
from monoblock.positions import inverse_frequencies, is_dynamic
from monoblock.spec import Rotary


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its approximation with tanh."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """GELU by its approximation with a sigmoid."""
    return x * torch.sigmoid(1.702 * x)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0) ** 2."""
    return F.relu(x).square()


# Named functions, since modules hold them and are pickled.
ACT: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": relu_squared,
    "silu": F.silu,
}

# ---------------------------------------------------------------------------- positions


def rotations(positions_bq: Tensor, rotary: Rotary, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, each (b, 1, q, dim). Dynamic scaling depends on each row's length."""
    if is_dynamic(rotary):
        return cos_sin(positions_bq, _dynamic(positions_bq, rotary), 1.0, dtype)
    # torch.compile warns about lru_cache.
    inverse, factor = (inverse_frequencies if dispatch.transformed() else _frequencies)(rotary)
    return cos_sin(positions_bq, torch.as_tensor(inverse).to(positions_bq.device), factor, dtype)


_frequencies = functools.lru_cache(maxsize=16)(inverse_frequencies)


def _dynamic(positions_bq: Tensor, rotary: Rotary) -> Tensor:
    """`inverse_frequencies` of dynamic scaling, (b, 1, 1, dim / 2), without reading the lengths on the host."""
    scaling = rotary.scaling
    assert scaling is not None
    exact = torch.float32 if positions_bq.device.type == "mps" else torch.float64  # MPS has no float64
    lengths_b = (positions_bq.amax(-1) + 1).clamp(min=scaling.original_length).to(exact)
    growth_b = scaling.factor * (lengths_b / scaling.original_length) - (scaling.factor - 1)
    theta_b = rotary.theta * growth_b ** (rotary.dim / (rotary.dim - 2))
    steps = torch.arange(0, rotary.dim, 2, dtype=exact, device=positions_bq.device) / rotary.dim
    return (1 / theta_b[:, None, None, None] ** steps).float()


def cos_sin(
    positions_bq: Tensor, inverse: Tensor, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of positions times frequencies (b or 1, 1, 1, dim / 2), each (b, 1, q, dim)."""
    angles = positions_bq[:, None, :, None].float() * inverse
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(x_bhqd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to the first `dim` channels (rotate-half): (a, b) -> (a cos - b sin, b cos + a sin). The result has
    the heads' dtype, also under autocast, where the angles have a wider one."""
    if x_bhqd.shape[2] > 1 and native_ops.usable(x_bhqd, cos, sin):
        return native_ops.apply_rope(x_bhqd, cos, sin).transpose(1, 2)
    dim = cos.shape[-1]
    rotated, kept = x_bhqd[..., :dim], x_bhqd[..., dim:]
    a, b = rotated.chunk(2, dim=-1)
    rotated = (rotated * cos + torch.cat((-b, a), dim=-1) * sin).to(x_bhqd.dtype)
    return torch.cat((rotated, kept), dim=-1) if kept.shape[-1] else rotated


def relative_position_bucket(distance: Tensor, count: int, max_distance: int) -> Tensor:
    """T5's bucket of each distance (key - query): half of the buckets are for later keys; in each half, half of the
    buckets are exact distances and the others grow logarithmically up to `max_distance`."""
    # A lookup table, since compiled logarithms may be rounded differently at the edges of buckets.
    half = count // 2
    exact = half // 2
    ratio, wide = max_distance / exact, half - exact
    edges = [math.ceil(exact * ratio ** (i / wide) - 1e-6) for i in range(1, wide)]
    behind = [
        far if far < exact else exact + sum(far >= edge for edge in edges) for far in range(max_distance + 1)
    ]
    table = torch.tensor(behind, device=distance.device)
    return torch.where(distance > 0, half, 0) + table[distance.abs().clamp(max=max_distance)]


# ---------------------------------------------------------------------------- attention mask

# A masked score on GPUs. Their kernels multiply scores by log2(e): the lowest number of the dtype, which is used on
# CPUs, would overflow, and a fully masked row would be NaN.
MASKED = -1e30
BLOCK = 256  # queries per block of a mask that is reduced block by block


def repeat_groups(x_bgkd: Tensor, heads: int) -> Tensor:
    """Keys or values of `g` groups as those of `heads` heads, neighbours sharing one."""
    groups = x_bgkd.shape[1]
    if groups == heads:
        return x_bgkd
    return x_bgkd[:, :, None].expand(-1, -1, heads // groups, -1, -1).flatten(1, 2)


@dataclass(frozen=True)
class Kernel:
    """A layer's options for attention kernels: the scale of q·k, the softcap, the dropout rate."""

    scale: float
    softcap: float | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class RelativeBias:
    """A bias for each distance (key - query) and head: `bias_nh` (2 * keys - 1, h), from distance 1 - keys on."""

    bias_nh: Tensor

    def __call__(self, distance_qk: Tensor) -> Tensor:
        """(h, q, k), the biases of distances (q, k)."""
        center = self.bias_nh.shape[0] // 2
        return F.embedding(distance_qk + center, self.bias_nh).permute(2, 0, 1)


@dataclass
class Scope:
    """The attention mask and biases, from indices: `valid_k & (k <= q or not causal) & (q - k < window)`.

    `index_q` (q,) and `index_k` (k,) are indices in the sequence; `valid_bk` is False for padding (None: there is
    none); `segment_bk` numbers the documents of a packed row (None: one document). `given` is the caller's own mask,
    (b or 1, h or 1, q, k): booleans, True where the query may attend to the key, or numbers to add to the scores; it
    replaces the causal mask. `aligned`: queries and keys are the same tokens, so that the kernels' own causal mask
    fits. `slopes_h` are ALiBi's; `relative` makes the bias (h, q, k) of distances (q, k). `masked_rows`: the spec's.
    """

    in_order: ClassVar[bool] = True  # keys are in sequence order, and the queries are at the last positions

    index_q: Tensor
    index_k: Tensor
    causal: bool
    aligned: bool
    valid_bk: Tensor | None = None
    segment_bk: Tensor | None = None
    given: Tensor | None = None
    slopes_h: Tensor | None = None
    relative: RelativeBias | None = None
    window: int | None = None
    masked_rows: str = "all"
    memo: dict[str, Any] = field(default_factory=dict)
    narrow: dict[Any, Scope] = field(default_factory=dict)

    def with_window(self, window: int, kept: int) -> Scope:
        """The same scope with a window, over the last `kept` keys; equal windows share one."""
        found = self.narrow.get(window)  # `kept` may be symbolic, and then is no key
        if found is None or not (self.aligned or found.index_k.shape[0] == kept):
            # Aligned keys are all kept; the older ONNX exporter would take `kept` for a constant. A slice from a
            # symbolic 0 on would have an unknown length in exported programs.
            every = self.aligned or kept == self.index_k.shape[0]
            cut = slice(None) if every else slice(self.index_k.shape[0] - kept, None)
            found = self.narrow[window] = replace(
                self,
                window=window,
                index_k=self.index_k[cut],
                valid_bk=None if self.valid_bk is None else self.valid_bk[:, cut],
                segment_bk=None if self.segment_bk is None else self.segment_bk[:, cut],
                given=None if self.given is None else self.given[..., cut],
                memo={},
                narrow={},
            )
        return found

    def last(self, count: int) -> Scope:
        """The same scope for the last `count` queries alone."""
        if count == self.index_q.shape[0]:
            return self
        given = None if self.given is None else self.given[:, :, -count:]
        return replace(self, index_q=self.index_q[-count:], aligned=False, given=given, memo={}, narrow={})

    def visible(self, start: int, stop: int | None, first: int, last: int | None) -> Tensor:
        """(b or 1, h or 1, stop - start, last - first), True where the query may attend to the key. `stop`, `last`
        None: to the end."""
        distance = self.index_q[start:stop, None] - self.index_k[None, first:last]
        visible = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if self.window is not None:
            visible = visible & (distance < self.window)
        visible = visible[None, None]
        if self.valid_bk is not None:
            visible = visible & self.valid_bk[:, None, None, first:last]
        if self.segment_bk is not None:
            own = self.segment_bk[:, self.index_q[start:stop] - self.index_k[0]]
            visible = visible & (own[:, None, :, None] == self.segment_bk[:, None, None, first:last])
        if self.given is not None and self.given.dtype == torch.bool:
            visible = visible & self.given[:, :, start:stop, first:last]
        return visible

    def bias(self, start: int, stop: int | None, first: int, last: int | None, dtype: torch.dtype) -> Tensor:
        """The additive mask (b or 1, h or 1, stop - start, last - first): 0 or ALiBi, and a finite minimum for masked
        keys (with -inf, a fully masked row would be NaN)."""
        lowest = torch.finfo(dtype).min
        if self.index_k.device.type != "cpu":
            lowest = max(MASKED, lowest)
        visible = self.visible(start, stop, first, last)
        added = torch.zeros((), dtype=dtype, device=visible.device)
        if self.relative is not None:
            distance = self.index_k[None, first:last] - self.index_q[start:stop, None]
            added = self.relative(distance)[None].to(dtype)
        if self.slopes_h is not None:
            distance = (self.index_k[None, first:last] - self.index_q[start:stop, None]).to(torch.float32)
            added = added + (self.slopes_h[None, :, None, None] * distance).to(dtype)
        if self.given is not None and self.given.dtype != torch.bool:
            # The minima of a mask of a wider dtype become -inf in this one.
            given = self.given[:, :, start:stop, first:last].to(dtype).clamp(min=lowest)
            added = (added + given).clamp(min=lowest)
        return torch.where(visible, added, lowest)

    def fully_masked(self) -> Tensor | None:
        """(b, 1, q, 1), True for fully masked queries: before a row's first real token, or with only padding in their
        window or document. None if there can be none."""
        if self.valid_bk is None or not (self.causal or self.segment_bk is not None):
            return None
        if "fully_masked" not in self.memo:
            self.memo["fully_masked"] = self._fully_masked(self.valid_bk)
        return self.memo["fully_masked"]

    def _fully_masked(self, valid_bk: Tensor) -> Tensor:
        if self.segment_bk is not None:
            if dispatch.transformed():
                return ~self.visible(0, None, 0, None).any(-1, keepdim=True)
            starts = range(0, self.index_q.shape[0], BLOCK)
            parts = [self.visible(i, i + BLOCK, 0, None).any(-1, keepdim=True) for i in starts]
            return ~torch.cat(parts, dim=2)
        # Integers, since the older ONNX exporter cannot sum booleans.
        real = F.pad(valid_bk.long().cumsum(-1), (1, 0))  # number of real tokens before each key
        stop = self.index_q - self.index_k[0] + 1
        count = real[:, stop]
        if self.window is not None:
            count = count - real[:, (stop - self.window).clamp(min=0)]
        return count[:, None, :, None] == 0

    def mean(self, v_bgkd: Tensor) -> Tensor:
        """(b, g, 1 or q, d): the mean of the values on which a fully masked query has equal weights. Computed by
        cumulative sums, without an array of queries x keys."""
        if self.masked_rows == "all" or self.valid_bk is None:
            return v_bgkd.mean(dim=2, keepdim=True)
        wide, real = v_bgkd.to(torch.promote_types(v_bgkd.dtype, torch.float32)), self.valid_bk.long()
        own = wide * real[:, None, :, None]
        if self.masked_rows == "valid":
            count = real.sum(-1)[:, None, None, None]
            mean = torch.where(
                count > 0, own.sum(2, keepdim=True) / count.clamp(min=1), wide.mean(2, keepdim=True)
            )
            return mean.to(v_bgkd.dtype)
        stop = self.index_q - self.index_k[0] + 1
        start = torch.zeros_like(stop) if self.window is None else (stop - self.window).clamp(min=0)
        every, own = (F.pad(x.cumsum(2), (0, 0, 1, 0)) for x in (wide, own))
        count = F.pad(real.cumsum(-1), (1, 0))[:, stop] + stop - start
        total = own[:, :, stop] + every[:, :, stop] - every[:, :, start]
        return (total / count[:, None, :, None]).to(v_bgkd.dtype)

    def equal_weights(self, dtype: torch.dtype) -> Tensor:
        """The attention weights that correspond to `mean`, (b or 1, 1, 1 or q, k)."""
        keys = self.index_k.shape[0]
        if self.masked_rows == "all" or self.valid_bk is None:
            return torch.ones(1, 1, 1, keys, dtype=dtype, device=self.index_k.device) / keys
        real = self.valid_bk[:, None, None]
        if self.masked_rows == "valid":
            chosen = real | ~real.any(-1, keepdim=True)
        else:
            distance = self.index_q[:, None] - self.index_k
            near = (
                torch.ones_like(distance, dtype=torch.bool) if self.window is None else distance < self.window
            )
            chosen = (distance >= 0) & (near | real)
        return (chosen / chosen.sum(-1, keepdim=True)).to(dtype)

    def keys_of(self, start: int, stop: int) -> tuple[int, int]:
        """The range of keys that any of these queries may attend to; all keys if they are not in order, or if an
        explicit mask is given, which may mask a row fully (equal weights are on all keys)."""
        if not self.in_order or self.given is not None:
            return 0, self.index_k.shape[0]
        past = self.index_k.shape[0] - self.index_q.shape[0]
        last = past + stop if self.causal else self.index_k.shape[0]
        return 0 if self.window is None else max(0, past + start - self.window + 1), last

    @property
    def by_key(self) -> bool:
        """Whether the additive mask, apart from the causal mask, depends on the key only."""
        if self.segment_bk is not None or self.given is not None or self.relative is not None:
            return False
        if self.window is None:
            return True
        # No comparison of lengths in compiled programs, which serve all lengths.
        return not dispatch.transformed() and self.causal and self.window >= self.index_k.shape[0]

    def key_bias(self) -> Tensor | None:
        """For `by_key` scopes: (b or 1, h or 1, 1, k) of ALiBi and padding, or None if there is neither."""
        if self.valid_bk is None and self.slopes_h is None:
            return None
        if "key_bias" not in self.memo:
            bias = torch.zeros((), device=self.index_k.device)
            if self.slopes_h is not None:
                # Relative to the middle key, which halves the largest magnitude and thus the rounding error.
                distance = (self.index_k - self.index_k[-1] // 2).to(torch.float32)
                bias = self.slopes_h[None, :, None, None] * distance
            if self.valid_bk is not None:
                bias = bias.masked_fill(~self.valid_bk[:, None, None, :], torch.finfo(torch.float32).min)
            self.memo["key_bias"] = bias
        return self.memo["key_bias"]
