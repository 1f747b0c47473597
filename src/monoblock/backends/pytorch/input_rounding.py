"""How the pass without padding rounds the inputs of an encoder's quantised products to 8 bits.

A few channels of a transformer's activations are many times as large as the others, in every text. In a group of
inputs with one of them the others have few steps left. These channels are multiplied in float32, as LLM.int8() does
(arXiv:2208.07339); which they are is a property of the weights, and is found by a pass over random tokens when the
library gets them. An activation's outputs, of mostly one sign, are rounded about the middle of each group's range.

The kernels with other inputs than 8 bits need neither, nor do decoders, whose other passes round all channels alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monoblock import native
from monoblock.backends.pytorch.base import ModelBase
from monoblock.backends.pytorch.quantization.modules import QuantizedMatrix
from monoblock.native.abi import InputRounding, LayerWeights

# The products of a layer, in the order of the library's peaks.
PRODUCTS = ("qkv", "out", "up", "down")
MOST_CHANNELS = 4  # multiplied in float32, of a product
# Each of them reduces the expected square of the rounding errors by this share.
LEAST_GAIN = 0.1
# The random tokens: sequences, and tokens of each.
SEQUENCES, LENGTH = 16, 32
PANEL = 64  # outputs to which columns are padded
ZERO = 128  # the code of 0 in 8 bits


def wanted(model: ModelBase) -> bool:
    """Whether the library's pass over this model rounds inputs to 8 bits and can be told how."""
    if model.spec.causal or native.level() != "avx512_vnni_bf16":
        return False
    return any(isinstance(module, QuantizedMatrix) and module.bits in (8, 4) for module in model.modules())


def random_tokens(vocab: int) -> list[list[int]]:
    """The sequences of token ids, the same for every model with that vocabulary."""
    return np.random.default_rng(0).integers(0, vocab, (SEQUENCES, LENGTH)).tolist()


def large_channels(peaks: Tensor, group: int) -> Tensor:
    """The channels (int32, ascending) to multiply in float32, by the largest magnitude of each channel (inputs,).

    The error of a group's rounding is as its largest magnitude; the sum of the squares of all groups counts. In turn,
    the channels of the group are taken that reduce it most per channel, as long as one reduces it by LEAST_GAIN."""
    grouped = torch.nn.functional.pad(peaks, (0, -len(peaks) % group)).unflatten(0, (-1, group))
    values, order = (x[:, : MOST_CHANNELS + 1] for x in grouped.sort(dim=1, descending=True))
    squares = (values.double() ** 2).tolist()
    taken = [0] * len(squares)  # of each group

    def gain(g: int, count: int) -> float:
        """How much the sum falls per channel, of the next `count` channels of a group."""
        return (squares[g][taken[g]] - squares[g][taken[g] + count]) / count

    while (left := MOST_CHANNELS - sum(taken)) > 0:
        best = max((gain(g, count), g, count) for g in range(len(taken)) for count in range(1, left + 1))
        if best[0] <= LEAST_GAIN * sum(own[n] for own, n in zip(squares, taken, strict=True)):
            break
        taken[best[1]] += best[2]
    chosen = [g * group + int(i) for g, n in enumerate(taken) for i in order[g, :n]]
    return torch.tensor(sorted(chosen), dtype=torch.int32)


class Roundings:
    """The tensors of the structures in `layers`, which live as long as this."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def set(
        self, layer: LayerWeights, product: str, modules: Sequence[Any], peaks: Tensor, one_sign: bool
    ) -> None:
        """Set a layer's structure for a product with these modules' adjacent matrices. `peaks` (inputs,): the largest
        magnitude of each channel of its inputs; `one_sign`: whether they are mostly of one sign."""
        if not all(isinstance(module, QuantizedMatrix) and module.bits in (8, 4) for module in modules):
            return
        weight_oi = torch.cat([module.dequantize() for module in modules])
        how = InputRounding()
        channels = large_channels(peaks, modules[0].group)
        if len(channels):
            columns = weight_oi[:, channels.long()].T
            columns = torch.nn.functional.pad(columns, (0, -len(weight_oi) % PANEL)).contiguous()
            how.channels, how.columns, how.count = self._keep(channels), self._keep(columns), len(channels)
        if one_sign and all(_symmetric(module) for module in modules):
            scale = torch.cat([module.scale for module in modules]).float()
            sums = weight_oi.unflatten(1, (-1, modules[0].group)).sum(-1)
            how.scale, how.low = self._keep(scale), self._keep(sums - ZERO * scale)
        setattr(layer, f"{product}_inputs", how)

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


def _symmetric(module: QuantizedMatrix) -> bool:
    """Whether a matrix has codes of 8 bits, a number as scale of each group and no low, without padding."""
    return (
        module.bits == 8
        and module.low is None
        and module.scale is not None
        and module.scale.is_floating_point()
        and module.columns == module.codes.shape[1]
    )
