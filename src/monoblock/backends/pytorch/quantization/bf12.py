"""Lossless compression of bfloat16 matrices to 12 bits per weight: the format, packing and unpacking.

Signs and mantissas are close to random, exponents are not: nearly all exponents of a row lie in a window of 15
consecutive values. A matrix (outputs, inputs) becomes bytes (outputs, header + 3/2 padded), with inputs padded to a
multiple of 128. Each row:

    header  words of 16 bits: the highest exponent of the window; the number of outliers (weights with other exponents);
            column and bits of each outlier. 32 bytes for every 2048 inputs, rounded up
    runs    of 128 weights: 128 bytes, sign and mantissa of each; 32 words, where bits [4 j, 4 j + 4) of word w are the
            highest exponent minus that of weight 32 j + w, or 15 for exponent 0 (zeros and subnormals)

DFloat11 (arXiv:2504.11651) compresses exponents by a Huffman code for GPUs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RUN = 128  # inputs are padded to a multiple of this
RUN_BYTES = RUN // 2 * 3
WORDS = 32  # words of a run
RANGE = 15  # exponents of the window
MOST_INPUTS = 1 << 16  # columns that 16 bits can index


def head_bytes(inputs: int) -> int:
    """Bytes of a row's header."""
    return -(-inputs // 2048) * 32


def _slots(inputs: int) -> int:
    """The number of outliers that a header can hold."""
    return head_bytes(inputs) // 4 - 1


def shape(outputs: int, inputs: int) -> tuple[int, int]:
    """The shape of a compressed matrix, in bytes."""
    return outputs, head_bytes(inputs) + -(-inputs // RUN) * RUN_BYTES


def pack(weight: Tensor) -> Tensor | None:
    """Compress weights (outputs, inputs). None if that saves nothing: rows are short, or one has too many outliers.
    ValueError: a weight is not representable in bfloat16."""
    outputs, inputs = weight.shape
    short = weight.to(torch.bfloat16)
    if weight.dtype != torch.bfloat16 and not (short == weight).all():
        raise ValueError(
            f"weights of {weight.dtype} that bfloat16 cannot represent cannot be compressed losslessly: load them with "
            "dtype=torch.bfloat16, which rounds them, or name the module in modules_to_not_convert"
        )
    if inputs > MOST_INPUTS or shape(outputs, inputs)[1] >= 2 * inputs:
        return None
    bits = F.pad(short, (0, -inputs % RUN)).view(torch.int16).int()
    exponent = bits >> 7 & 0xFF
    slots = _slots(inputs)
    highest, other = _window(exponent, slots)
    count = other.sum(1)
    if (count > slots).any():
        return None
    lower = torch.where(other | (exponent == 0), RANGE, highest[:, None] - exponent)
    rest = torch.where(other, 0, bits >> 8 & 0x80 | bits & 0x7F).to(torch.uint8)
    nibbles = lower.view(outputs, -1, 4, WORDS)
    words = nibbles[:, :, 0] | nibbles[:, :, 1] << 4 | nibbles[:, :, 2] << 8 | nibbles[:, :, 3] << 12
    runs = torch.cat((rest.view(outputs, -1, RUN), words.to(torch.int16).view(torch.uint8)), dim=-1)
    return torch.cat((_head(bits, highest, other, count, slots), runs.flatten(1)), dim=1)


def unpack(codes: Tensor, inputs: int) -> Tensor:
    """Decompress to bfloat16 (outputs, inputs). Columns out of range in a corrupt header are ignored."""
    start = head_bytes(inputs)
    head = codes[:, :start].contiguous().view(torch.int16)
    runs = codes[:, start:].unflatten(1, (-1, RUN_BYTES))
    words = runs[..., RUN:].contiguous().view(torch.int16)
    lower = torch.stack([words >> shift & 15 for shift in (0, 4, 8, 12)], dim=2).flatten(1)
    exponent = torch.where(lower == RANGE, 0, head[:, :1] - lower)
    rest = runs[..., :RUN].flatten(1).to(torch.int16)
    bits = (rest & 0x80) << 8 | exponent << 7 | rest & 0x7F
    slots = torch.arange(_slots(inputs), device=codes.device)
    rows, index = (slots < (head[:, 1:2].int() & 0xFFFF)).nonzero(as_tuple=True)
    columns = head[rows, 2 + 2 * index].long() & 0xFFFF
    known = columns < inputs
    bits[rows[known], columns[known]] = head[rows, 3 + 2 * index][known]
    return bits.view(torch.bfloat16)[:, :inputs]


def _window(exponent: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """For each row the highest exponent of the window, and a mask of the outliers: the fewest that were found.

    A window that ends at the row's largest exponent excludes its smallest weights. If those are too many, lower
    windows, which exclude the largest weights, are tried.
    """
    highest = exponent.amax(1)
    other = _outside(exponent, highest)
    if (other.sum(1) <= slots).all():
        return highest, other
    for top in exponent.topk(min(slots + 1, exponent.shape[1])).values.unbind(1)[1:]:
        tried = _outside(exponent, top)
        better = tried.sum(1) < other.sum(1)
        highest = torch.where(better, top, highest)
        other = torch.where(better[:, None], tried, other)
    return highest, other


def _outside(exponent: Tensor, highest: Tensor) -> Tensor:
    lower = highest[:, None] - exponent
    return ((lower < 0) | (lower >= RANGE)) & (exponent != 0)


def _head(bits: Tensor, highest: Tensor, other: Tensor, count: Tensor, slots: int) -> Tensor:
    outputs = bits.shape[0]
    head = torch.zeros((outputs, 2 + 2 * slots), dtype=torch.int32, device=bits.device)
    head[:, 0], head[:, 1] = highest, count
    rows, columns = other.nonzero(as_tuple=True)
    index = torch.arange(rows.numel(), device=bits.device) - (count.cumsum(0) - count)[rows]
    head[rows, 2 + 2 * index] = columns.int()
    head[rows, 3 + 2 * index] = bits[rows, columns]
    return head.to(torch.int16).view(torch.uint8)
