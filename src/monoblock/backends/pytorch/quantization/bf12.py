"""bfloat16 matrices in 12 bits a weight, without loss: the format, and the way there and back.

Signs and mantissas are as good as random, exponents are not: nearly all of a row's are among 15 neighbours. A matrix
(outputs, inputs) becomes bytes (outputs, head + 3/2 padded), its inputs padded to a multiple of 128. Of each row:

    head   words of 16 bits: the highest of its 15 exponents; how many weights have none of them; the column and the
           bits of each of those. 32 bytes for every 2048 inputs that have begun
    runs   of 128 weights: 128 bytes, the sign and the mantissa of each; 32 words, of which word w has in bits
           [4 j, 4 j + 4) by how much the exponent of weight 32 j + w is below the highest, 15 for exponent 0 (zeros
           among others)

That most of a model's exponents are few was used for GPUs by DFloat11 (arXiv:2504.11651), with a Huffman code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RUN = 128  # inputs are padded to a multiple of this
RUN_BYTES = RUN // 2 * 3
WORDS = 32  # of a run
RANGE = 15  # exponents that have a name
MOST_INPUTS = 1 << 16  # columns that a word can name


def head_bytes(inputs: int) -> int:
    """How long a row's head is."""
    return -(-inputs // 2048) * 32


def _slots(inputs: int) -> int:
    """How many weights a head has room for."""
    return head_bytes(inputs) // 4 - 1


def shape(outputs: int, inputs: int) -> tuple[int, int]:
    """The shape of a packed matrix."""
    return outputs, head_bytes(inputs) + -(-inputs // RUN) * RUN_BYTES


def pack(weight: Tensor) -> Tensor | None:
    """Rows of weights (outputs, inputs) packed; None if that saves nothing, the rows being short, or one of them having
    too many exponents. ValueError: they are not bfloat16 numbers."""
    outputs, inputs = weight.shape
    short = weight.to(torch.bfloat16)
    if weight.dtype != torch.bfloat16 and not (short == weight).all():
        raise ValueError(
            f"weights of {weight.dtype} that are no bfloat16 numbers cannot be packed without loss: load them with "
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
    """The weights (outputs, inputs) again, in bfloat16. What a damaged head names beyond them is passed over."""
    start = head_bytes(inputs)
    head = codes[:, :start].contiguous().view(torch.int16)
    runs = codes[:, start:].unflatten(1, (-1, RUN_BYTES))
    words = runs[..., RUN:].contiguous().view(torch.int16)
    lower = torch.stack([words >> shift & 15 for shift in (0, 4, 8, 12)], dim=2).flatten(1)
    exponent = torch.where(lower == RANGE, 0, head[:, :1] - lower)
    rest = runs[..., :RUN].flatten(1).to(torch.int16)
    bits = (rest & 0x80) << 8 | exponent << 7 | rest & 0x7F
    slots = torch.arange(_slots(inputs), device=codes.device)
    rows, places = (slots < (head[:, 1:2].int() & 0xFFFF)).nonzero(as_tuple=True)
    columns = head[rows, 2 + 2 * places].long() & 0xFFFF
    known = columns < inputs
    bits[rows[known], columns[known]] = head[rows, 3 + 2 * places][known]
    return bits.view(torch.bfloat16)[:, :inputs]


def _window(exponent: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """For each row the highest named exponent, and which weights have none of the names: the fewest that were found.

    A row's own highest exponent leaves out its smallest weights. Where those are too many, its largest weights are left
    out one after the other.
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
    places = torch.arange(rows.numel(), device=bits.device) - (count.cumsum(0) - count)[rows]
    head[rows, 2 + 2 * places] = columns.int()
    head[rows, 3 + 2 * places] = bits[rows, columns]
    return head.to(torch.int16).view(torch.uint8)
