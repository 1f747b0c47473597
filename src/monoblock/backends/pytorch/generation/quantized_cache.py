"""A KV cache in 8 or 4 bits: the newest tokens unquantised, older ones quantised per group of channels.

Asymmetric quantisation: each group of channels of a token has a minimum and a step, `x ~ low + step * code` with an
integer `code` in [0, 2 ** bits), so that the error is at most half a step. A layer is dequantised when it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from monoblock.backends.pytorch.cache import Cache, Legacy


@dataclass
class QuantizedBlock:
    """The quantised keys or values of n tokens: codes (b, g, n, d * bits / 8), uint8; step and low (b, g, n, groups,
    1), float32."""

    codes: Tensor
    step: Tensor
    low: Tensor

    @classmethod
    def of(cls, x_bgnd: Tensor, bits: int, group: int) -> QuantizedBlock:
        """Quantise keys or values (b, g, n, d)."""
        grouped = x_bgnd.float().unflatten(-1, (-1, group))
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        # A group of equal values is represented by low alone; the step must only be positive.
        step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
        codes = ((grouped - low) / step).round().clamp(0, 2**bits - 1).to(torch.uint8).flatten(-2)
        if bits == 4:
            codes = codes[..., ::2] | (codes[..., 1::2] << 4)
        return cls(codes, step, low)

    def dequantized(self, bits: int, dtype: torch.dtype) -> Tensor:
        """The dequantised values (b, g, n, d)."""
        codes = self.codes
        if bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
        groups = self.step.shape[-2]
        return (codes.float().unflatten(-1, (groups, -1)) * self.step + self.low).flatten(-2).to(dtype)

    def joined(self, newer: QuantizedBlock) -> QuantizedBlock:
        """The concatenation of this block and a newer one."""
        return QuantizedBlock(
            *(torch.cat(pair, dim=2) for pair in zip(self.tensors(), newer.tensors(), strict=True))
        )

    def first(self, tokens: int) -> QuantizedBlock:
        """The first `tokens` tokens."""
        return QuantizedBlock(*(tensor[:, :, :tokens] for tensor in self.tensors()))

    def rows(self, index: Tensor) -> QuantizedBlock:
        """The rows `index` of the batch."""
        return QuantizedBlock(*(tensor.index_select(0, index.to(tensor.device)) for tensor in self.tensors()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, steps, lows."""
        return self.codes, self.step, self.low


class QuantizedCache(Cache):
    """A growing cache with the last `residual_length` to `2 * residual_length` tokens unquantised, and older ones in
    `nbits` (8 or 4) per group of `q_group_size` channels (per head, if that does not divide the head width).

    ValueError: an option is out of range.
    """

    def __init__(self, nbits: int = 4, q_group_size: int = 64, residual_length: int = 128) -> None:
        super().__init__()
        if nbits not in (4, 8):
            raise ValueError(f"QuantizedCache.nbits must be 8 or 4, got {nbits!r}")
        if q_group_size < 2 or residual_length < 1:
            raise ValueError(
                f"QuantizedCache needs q_group_size of 2 or more and residual_length of 1 or more, got {q_group_size}, "
                f"{residual_length}"
            )
        self.bits, self.group, self.residual = nbits, q_group_size, residual_length
        self.blocks: list[tuple[QuantizedBlock, QuantizedBlock] | None] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        if layer_idx == len(self.keys):
            self.keys.append(key_states)
            self.values.append(value_states)
            self.lengths.append(0)
            self.blocks.append(None)
        else:
            self.keys[layer_idx] = torch.cat((self.keys[layer_idx], key_states), dim=2)
            self.values[layer_idx] = torch.cat((self.values[layer_idx], value_states), dim=2)
        self.lengths[layer_idx] += key_states.shape[2]
        result = self._layer(layer_idx)
        if self.keys[layer_idx].shape[2] > 2 * self.residual:
            self._quantize(layer_idx)
        return result

    def _quantize(self, layer_idx: int) -> None:
        """Quantise all but the last `residual` tokens of a layer."""
        head_dim = self.keys[layer_idx].shape[-1]
        group = self.group if head_dim % self.group == 0 else head_dim
        blocks: list[QuantizedBlock] = []
        for tensors in (self.keys, self.values):
            old, tensors[layer_idx] = tensors[layer_idx].split(
                (tensors[layer_idx].shape[2] - self.residual, self.residual), dim=2
            )
            tensors[layer_idx] = tensors[layer_idx].clone()
            blocks.append(QuantizedBlock.of(old, self.bits, group))
        before = self.blocks[layer_idx]
        if before is not None:
            blocks = [old.joined(new) for old, new in zip(before, blocks, strict=True)]
        self.blocks[layer_idx] = (blocks[0], blocks[1])

    def _layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if (block := self.blocks[layer_idx]) is None:
            return keys, values
        return (
            torch.cat((block[0].dequantized(self.bits, keys.dtype), keys), dim=2),
            torch.cat((block[1].dequantized(self.bits, values.dtype), values), dim=2),
        )

    def crop(self, max_length: int) -> None:
        super().crop(max_length)
        for i, length in enumerate(self.lengths):
            block = self.blocks[i]
            old = 0 if block is None else block[0].codes.shape[2]
            if block is not None and length < old:
                self.blocks[i] = (block[0].first(length), block[1].first(length))
            for tensors in (self.keys, self.values):
                tensors[i] = tensors[i][:, :, : max(0, length - old)]

    def reset(self) -> None:
        self.crop(0)
        self.blocks = [None] * len(self.blocks)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.blocks = [None if p is None else (p[0].rows(beam_idx), p[1].rows(beam_idx)) for p in self.blocks]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys:
            rows = torch.arange(self.keys[0].shape[0], device=self.keys[0].device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def to_legacy_cache(self) -> Legacy:
        return tuple(self._layer(i) for i in range(len(self)))


def quantized(settings: Mapping[str, Any]) -> QuantizedCache:
    """The cache of a `cache_config`. ValueError: an unknown option."""
    known = ("nbits", "q_group_size", "residual_length")
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"cache_config has no {unknown[0]!r} here; it takes {', '.join(known)}")
    return QuantizedCache(**settings)
