"""AdamW's moments in 8 bits: block-wise dynamic quantisation (Dettmers et al., arXiv 2110.02861).

Each block of 256 consecutive values has a float32 scale, its largest magnitude, and a byte per value: the index of the
nearest of 256 levels from -1 to 1 (moments with a sign) or from 0 to 1 (squares). Levels are finest near zero: seven
decades, of which the highest has 64 midpoints per sign (128 for squares), each lower one half as many.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # values that share a scale
LEAST = 4096  # values from which a parameter's moments are quantised; as in bitsandbytes
_DECADES = 7
_CELLS = 1 << 16  # the upper halves of a float32


class QuantizedMoments(NamedTuple):
    """The state of a parameter: the number of its steps, and codes (the parameter's shape) and scales (blocks,) of the
    means of its gradients and of their squares."""

    step: Tensor
    exp_avg: Tensor
    exp_avg_scale: Tensor
    exp_avg_sq: Tensor
    exp_avg_sq_scale: Tensor

    @classmethod
    def zeros(cls, shape: torch.Size, step: Tensor, device: torch.device) -> QuantizedMoments:
        """The state of a parameter of this shape before the first step."""
        means, squares = (torch.full(shape, c, dtype=torch.uint8, device=device) for c in (ZERO, 0))
        scales = [torch.zeros(-(-shape.numel() // BLOCK), device=device) for _ in range(2)]
        return cls(step, means, scales[0], squares, scales[1])

    def update(self, count: int, chunk: int, adamw: Callable[[slice, Tensor, Tensor, Tensor], None]) -> None:
        """A step of `count` values in row-major order, of which float32 moments of `chunk` exist at a time.
        `adamw(values, step, mean, square)` updates the parameter there, and the moments."""
        assert chunk % BLOCK == 0
        mean_codes, square_codes = self.exp_avg.view(-1), self.exp_avg_sq.view(-1)
        after = self.step
        for start in range(0, count, chunk):
            own = slice(start, min(start + chunk, count))
            blocks = slice(start // BLOCK, -(-own.stop // BLOCK))
            mean = dequantized(mean_codes[own], self.exp_avg_scale[blocks], signed=True)
            square = dequantized(square_codes[own], self.exp_avg_sq_scale[blocks], signed=False)
            after = self.step.clone()
            adamw(own, after, mean, square)
            mean_codes[own], self.exp_avg_scale[blocks] = quantized(mean, signed=True)
            square_codes[own], self.exp_avg_sq_scale[blocks] = quantized(square, signed=False)
        self.step.copy_(after)


class _Tables(NamedTuple):
    """`levels` (256,); `upper` (256,): the midpoint between a level and the next one; `cells` (65536,): the level of
    the least value whose upper 16 bits these are. No cell holds two midpoints, so that a comparison with one finds the
    nearest level."""

    levels: Tensor
    upper: Tensor
    cells: Tensor


def _levels(signed: bool) -> Tensor:
    decades: list[Tensor] = []
    for i in range(_DECADES):
        edges = torch.linspace(0.1, 1, (1 << i if signed else 2 << i) + 1, dtype=torch.float64)
        middle = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i + 1 - _DECADES)
        decades += [middle, -middle] if signed else [middle]
    return torch.cat([*decades, torch.tensor([0.0, 1.0], dtype=torch.float64)]).sort().values


@functools.cache
def tables(signed: bool, device: torch.device) -> _Tables:
    """The tables of moments with or without a sign."""
    levels = _levels(signed)
    upper = ((levels[1:] + levels[:-1]) / 2).float()
    cells = torch.arange(_CELLS, dtype=torch.int32) << 16
    ends = torch.stack((cells, cells | (_CELLS - 1))).view(torch.float32).nan_to_num(0.0, 1.0, -1.0)
    lowest = torch.bucketize(ends.amin(0), upper).to(torch.uint8)
    upper = torch.cat((upper, torch.tensor([torch.inf])))
    return _Tables(levels.float().to(device), upper.to(device), lowest.to(device))


ZERO = int((_levels(signed=True) == 0).nonzero())  # the code of 0 in moments with a sign


def quantized(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (values,) and scales (blocks,) of float32 values (values,).

    Squares above zero have a code above zero: a step divides by their root, and a mean over a square that was rounded
    to zero would be a step of any size.
    """
    count = len(values)
    blocks = F.pad(values, (0, -count % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    units = blocks / torch.where(scale > 0, scale, 1.0)[:, None]
    levels = tables(signed, values.device)
    flat = units.view(-1)[:count]
    codes = levels.cells.index_select(0, (flat.view(torch.int32) >> 16) & (_CELLS - 1))
    # `view` instead of a conversion of booleans, which takes longer than all the rest.
    codes += (flat > levels.upper.index_select(0, codes.int())).view(torch.uint8)
    if not signed:
        codes = torch.maximum(codes, (values > 0).view(torch.uint8))
    return codes, scale


def dequantized(codes: Tensor, scale: Tensor, *, signed: bool) -> Tensor:
    """The float32 values (values,) of codes (values,) and scales (blocks,)."""
    units = tables(signed, codes.device).levels.index_select(0, codes.int())
    padded = F.pad(units, (0, -len(units) % BLOCK)).view(-1, BLOCK)
    return padded.mul_(scale[:, None]).view(-1)[: len(units)]
