"""Pure functions on PyTorch tensors: activations, rotary positions, and which key each query sees.

Shape suffixes: b batch, q queries, k keys, h heads, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from monoblock.backends.pytorch.kernels import native_ops
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


# Modules hold these functions: named ones, which can be pickled.
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
    """cos and sin of the rotary angles, each (b, 1, q, dim). Dynamic scaling goes by each row's own length."""
    lengths = (positions_bq.amax(-1) + 1).tolist() if is_dynamic(rotary) else [0]
    found = [inverse_frequencies(rotary, int(length)) for length in lengths]
    inverse, factor = torch.stack([torch.tensor(each) for each, _ in found])[:, None, None], found[0][1]
    return turns(positions_bq, inverse.to(positions_bq.device), factor, dtype)


def turns(positions_bq: Tensor, inverse: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of positions times frequencies (b or 1, 1, 1, dim / 2), each (b, 1, q, dim)."""
    angles = positions_bq[:, None, :, None].float() * inverse
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(x_bhqd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `dim` channels by half-rotation: (a, b) -> (a cos - b sin, b cos + a sin)."""
    if x_bhqd.shape[2] > 1 and native_ops.usable(x_bhqd, cos, sin):
        return native_ops.turn(x_bhqd, cos, sin).transpose(1, 2)
    dim = cos.shape[-1]
    turned, kept = x_bhqd[..., :dim], x_bhqd[..., dim:]
    a, b = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-b, a), dim=-1) * sin
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned


def bucketed(distance: Tensor, count: int, max_distance: int) -> Tensor:
    """T5's bucket of each distance (key - query): half of the buckets look ahead; in each half, half are exact and the
    rest grow with the logarithm up to `max_distance`."""
    half = count // 2
    exact = half // 2
    far = distance.abs()
    grown = torch.log(far.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    grown = (exact + grown.to(torch.long)).clamp(max=half - 1)
    return torch.where(distance > 0, half, 0) + torch.where(far < exact, far, grown)


# ---------------------------------------------------------------------------- who sees whom

# Stands on GPUs for a score that does not count. Their kernels multiply it by log2(e): the lowest number of a dtype,
# which CPUs get, would become infinite, and a row of nothing else no number.
UNSEEN = -1e30


@dataclass
class Scope:
    """Which keys each query may see, from indices alone: `valid_k & (k <= q or not causal) & (q - k < window)`.

    `index_q` (q,) and `index_k` (k,) are places in the sequence; `valid_bk` is False for padding (None: there is
    none); `segment_bk` numbers the parts of a packed row (None: one part). `aligned`: queries and keys are the
    same tokens, so that the kernels' own causal mask fits. `slopes_h` are ALiBi's; `relative` makes the bias (h, q, k)
    of distances (q, k).
    """

    in_order: ClassVar[bool] = True  # the keys stand in their order, and the queries are the last of them

    index_q: Tensor
    index_k: Tensor
    causal: bool
    aligned: bool
    valid_bk: Tensor | None = None
    segment_bk: Tensor | None = None
    slopes_h: Tensor | None = None
    relative: Callable[[Tensor], Tensor] | None = None
    window: int | None = None
    memo: dict[str, Any] = field(default_factory=dict)
    narrow: dict[tuple[int, int], Scope] = field(default_factory=dict)

    def narrowed(self, window: int, kept: int) -> Scope:
        """The same scope with a window, over the last `kept` keys; equal windows share one."""
        if (window, kept) not in self.narrow:
            cut = slice(self.index_k.shape[0] - kept, None)
            valid = None if self.valid_bk is None else self.valid_bk[:, cut]
            segment = None if self.segment_bk is None else self.segment_bk[:, cut]
            self.narrow[window, kept] = replace(
                self,
                window=window,
                index_k=self.index_k[cut],
                valid_bk=valid,
                segment_bk=segment,
                memo={},
                narrow={},
            )
        return self.narrow[window, kept]

    def last(self, count: int) -> Scope:
        """The same scope for the last `count` queries alone."""
        if count == self.index_q.shape[0]:
            return self
        return replace(self, index_q=self.index_q[-count:], aligned=False, memo={}, narrow={})

    def visible(self, start: int, stop: int, first: int, last: int) -> Tensor:
        """(b or 1, 1, stop - start, last - first), True where the query may see the key."""
        distance = self.index_q[start:stop, None] - self.index_k[None, first:last]
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.causal:
            seen = distance >= 0
        if self.window is not None:
            seen = seen & (distance < self.window)
        seen = seen[None, None]
        if self.valid_bk is not None:
            seen = seen & self.valid_bk[:, None, None, first:last]
        if self.segment_bk is not None:
            own = self.segment_bk[:, self.index_q[start:stop] - self.index_k[0]]
            seen = seen & (own[:, None, :, None] == self.segment_bk[:, None, None, first:last])
        return seen

    def bias(self, start: int, stop: int, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """What is added to the scores, (b or 1, h or 1, stop - start, last - first): 0 or ALiBi, and a finite
        minimum where the key may not be seen (a row without any key must not become NaN)."""
        lowest = torch.finfo(dtype).min
        if self.index_k.device.type != "cpu":
            lowest = max(UNSEEN, lowest)
        seen = self.visible(start, stop, first, last)
        if self.relative is not None:
            distance = self.index_k[None, first:last] - self.index_q[start:stop, None]
            return self.relative(distance)[None].to(dtype).masked_fill(~seen, lowest)
        if self.slopes_h is None:
            return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, lowest)
        away = (self.index_k[None, first:last] - self.index_q[start:stop, None]).to(torch.float32)
        ramp = self.slopes_h[None, :, None, None] * away
        return ramp.to(dtype).expand(seen.shape[0], -1, -1, -1).masked_fill(~seen, lowest)

    def blind(self) -> Tensor | None:
        """(b, 1, q, 1), True for queries that see no key: before a row's first real token, or with nothing but padding
        in their window. None if no padding can make such."""
        if self.valid_bk is None or not self.causal:
            return None
        if "blind" not in self.memo:
            seen = F.pad(self.valid_bk.cumsum(-1), (1, 0))  # how many real tokens come before each key
            place = self.index_q - self.index_k[0] + 1
            count = seen[:, place]
            if self.window is not None:
                count = count - seen[:, (place - self.window).clamp(min=0)]
            self.memo["blind"] = count[:, None, :, None] == 0
        return self.memo["blind"]

    def keys_of(self, start: int, stop: int) -> tuple[int, int]:
        """The range of keys that any of these queries may see; all of them where they stand in no order."""
        if not self.in_order:
            return 0, self.index_k.shape[0]
        past = self.index_k.shape[0] - self.index_q.shape[0]
        last = past + stop if self.causal else self.index_k.shape[0]
        return 0 if self.window is None else max(0, past + start - self.window + 1), last

    @property
    def by_key(self) -> bool:
        """Whether, beside the kernel's causal mask, what is added to a score depends on its key alone."""
        length = self.index_k.shape[0]
        return (
            self.segment_bk is None
            and self.relative is None
            and (self.window is None or (self.causal and self.window >= length))
        )

    def key_bias(self) -> Tensor | None:
        """For `by_key` scopes: (b or 1, h or 1, 1, k) of ALiBi and padding, or None if there is neither."""
        if self.valid_bk is None and self.slopes_h is None:
            return None
        if "key_bias" not in self.memo:
            bias = torch.zeros((), device=self.index_k.device)
            if self.slopes_h is not None:
                # From the middle, so that the largest sum that is rounded is half as large.
                away = (self.index_k - self.index_k[-1] // 2).to(torch.float32)
                bias = self.slopes_h[None, :, None, None] * away
            if self.valid_bk is not None:
                bias = bias.masked_fill(~self.valid_bk[:, None, None, :], torch.finfo(torch.float32).min)
            self.memo["key_bias"] = bias
        return self.memo["key_bias"]
