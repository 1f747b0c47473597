"""The formats of matrices in 8, 4 or 12 bits per weight: quantisation and dequantisation.

A matrix (outputs, inputs) is quantised along its inputs, which are padded to a multiple of 128:

    8 bits   codes uint8 (outputs, padded); scale (outputs, padded / group);           weight = scale * (code - 128)
             or also low (as scale);                                                   weight = scale * code + low
    4 bits   codes uint8 (outputs, padded / 2); scale and low (as above);              weight = scale * code + low
             or only scale;                                                            weight = scale * (code - 8)
    either   low uint8 beside scale fp16 or float32: zero points;                      weight = scale * (code - low)
    12 bits  codes uint8 (outputs, bytes of a row), nothing else: lossless bfloat16; see bf12.py

`pack` gives fp16 scales for groups of 64 or 128, and in 4 bits a low. Matrices that other tools quantised also have
groups of 16 or 32, 8 bits with a low and 4 bits without, zero points in place of lows, and scale and low in float32 or,
both as uint8, in two levels (checkpoint/packed.py), as far as their numbers need it. The tensors' shapes tell the bits
and the group.

In 4 bits, byte j of each run of 128 weights holds the codes of weights j (low nibble) and j + 64 (high nibble). Rows
are independent, so that quantised matrices can be concatenated and split by rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from monoblock.backends.pytorch.kernels import dispatch
from monoblock.backends.pytorch.quantization import bf12
from monoblock.backends.pytorch.quantization.bf12 import RUN
from monoblock.checkpoint.packed import SUPER_BLOCK, TWO_LEVEL, ZEROS, group_of, scale_width
from monoblock.quantization import LOSSLESS

BITS = (8, 4)  # with scales
MIDDLE = ZEROS[8]
# The tensors of a quantised matrix, in the order in which a QuantizedTensor has them, with the dtypes of `pack`.
DTYPES = {"codes": torch.uint8, "scale": torch.float16, "low": torch.float16}
# The dtypes that scale and low may have, by safetensors' names; uint8: two levels, or zero points.
SCALES = {"F16": torch.float16, "F32": torch.float32, TWO_LEVEL: torch.uint8}

# Rows are quantised and dequantised in chunks of about this many weights, which stay in a core's cache.
_CHUNK = 1 << 20
# The range of a group is tried at these fractions of its span: clipping the extremes reduces the step of all other
# weights.
_SHARES = (1.0, 0.92, 0.84, 0.76)
_FLOOR = 0.1  # relative to a group's mean magnitude: the importance of a weight of 0
_ROUNDS = 2  # iterations of fitting scale and low to the codes, and recomputing the codes


class QuantizedTensor(NamedTuple):
    """A matrix (rows, columns) in one of the formats; `scale` and `low` as in the module's table.

    A tuple, since one is created for each product: that takes 0.4 microseconds, a frozen dataclass 1.3.
    """

    codes: Tensor
    scale: Tensor | None
    low: Tensor | None
    bits: int
    group: int
    columns: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], columns: int) -> QuantizedTensor:
        """The matrix of these tensors; their shapes determine the number of bits and the group."""
        codes, scale, low = (tensors.get(name) for name in DTYPES)
        assert codes is not None
        two_level = scale is not None and scale.dtype == SCALES[TWO_LEVEL]
        bits, group = form_of(codes.shape[1], None if scale is None else scale.shape[1], columns, two_level)
        return cls(codes, scale, low, bits, group, columns)

    @property
    def rows(self) -> int:
        """The matrix's rows."""
        return self.codes.shape[0]

    @property
    def zero_points(self) -> bool:
        """Whether `low` has the codes of 0 of the groups."""
        low, scale = self.low, self.scale
        return low is not None and scale is not None and low.dtype == torch.uint8 != scale.dtype

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without those that are None."""
        return {name: x for name, x in zip(DTYPES, self[:3], strict=True) if x is not None}

    def select(self, rows: slice | Tensor) -> QuantizedTensor:
        """Some of the matrix's rows."""
        codes, scale, low = (None if x is None else x[rows] for x in self[:3])
        assert codes is not None
        return QuantizedTensor(codes, scale, low, *self[3:])

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The dequantised matrix (rows, columns)."""
        if self.rows * self.columns <= _CHUNK or not self.codes.is_cpu or dispatch.transformed():
            return self._unpack(dtype)
        made = torch.empty(self.rows, self.columns, dtype=dtype)
        for rows in _chunks(self.rows, self.columns):
            made[rows] = self.select(rows)._unpack(dtype)
        return made

    def _unpack(self, dtype: torch.dtype) -> Tensor:
        codes, scale, low, bits, group, columns = self
        if scale is None:
            return bf12.unpack(codes, columns).to(dtype)
        if bits == 4:
            runs = codes.unflatten(1, (-1, RUN // 2))
            codes = torch.cat((runs & 15, runs >> 4), dim=-1).flatten(1)
        grouped = codes.float().unflatten(1, (-1, group))
        if low is None or self.zero_points:
            zero = ZEROS[bits] if low is None else low.float()[..., None]
            weights = (grouped - zero) * _values(scale, group)[..., None]
        else:
            weights = grouped * _values(scale, group)[..., None] + _values(low, group)[..., None]
        return weights.flatten(1)[:, :columns].to(dtype)


def _values(stored: Tensor, group: int) -> Tensor:
    """The values of scales, or of lows that are no zero points, as float32 (rows, groups)."""
    if stored.dtype != SCALES[TWO_LEVEL]:
        return stored.float()
    blocks = stored.shape[1] // (SUPER_BLOCK // group + 2)
    factors, numbers = stored.split((stored.shape[1] - 2 * blocks, 2 * blocks), dim=1)
    numbers = numbers.contiguous().view(torch.float16).float()
    return factors.contiguous().view(torch.int8).float() * numbers.repeat_interleave(
        SUPER_BLOCK // group, dim=1
    )


def shapes(
    bits: int, group: int, outputs: int, inputs: int, low: bool | None = None, two_level: bool = False
) -> dict[str, tuple[int, int]]:
    """The shapes of a quantised matrix's tensors, by name; `low`: whether it has one, or zero points (None: in 4
    bits); `two_level`: whether its scales have two levels."""
    if bits == LOSSLESS:
        return {"codes": bf12.shape(outputs, inputs)}
    padded = -(-inputs // RUN) * RUN
    scale = (outputs, scale_width(padded, group, two_level=two_level))
    found = {"codes": (outputs, padded * bits // 8), "scale": scale}
    return found | ({"low": scale} if (bits == 4 if low is None else low) else {})


def form_of(codes: int, scales: int | None, inputs: int, two_level: bool = False) -> tuple[int, int]:
    """Bits and group of a matrix with `codes` bytes and `scales` scales (None: no scales) per row; of scales of two
    levels, the bytes.

    ValueError: there is no such format."""
    if scales is None:
        return LOSSLESS, RUN
    padded = -(-inputs // RUN) * RUN
    bits = next((bits for bits in BITS if codes == padded * bits // 8), None)
    group = group_of(scales, padded, two_level=two_level)
    if bits is None or group is None:
        raise ValueError(f"rows of {inputs} weights have {codes} bytes of codes and {scales} scales")
    return bits, group


class DoesNotFit(ValueError):
    """A bfloat16 matrix for which 12 bits save nothing: its rows are short, or have many outliers."""


def pack(weight: Tensor, bits: int, group: int) -> QuantizedTensor:
    """A floating-point matrix (outputs, inputs) quantised. ValueError: a weight is not finite, or a scale exceeds
    fp16; in 12 bits, a weight is not representable in bfloat16. DoesNotFit: 12 bits save nothing."""
    if bits == LOSSLESS:
        return QuantizedTensor(_lossless(weight), None, None, LOSSLESS, group, weight.shape[1])
    outputs, inputs = weight.shape
    made = {
        name: torch.empty(shape, dtype=DTYPES[name], device=weight.device)
        for name, shape in shapes(bits, group, outputs, inputs).items()
    }
    padded = -(-inputs // RUN) * RUN
    for rows in _chunks(outputs, padded):
        # Padding replicates a weight of the group, so that it does not extend the range.
        chunk = F.pad(weight[rows].float()[None], (0, padded - inputs), mode="replicate")[0]
        if not torch.isfinite(chunk).all():
            raise ValueError(
                "a matrix has weights that are not finite: it cannot be quantised; name it in "
                "modules_to_not_convert"
            )
        grouped = chunk.unflatten(1, (-1, group))
        for name, part in (_eight(grouped) if bits == 8 else _four(grouped, padded - inputs)).items():
            made[name][rows] = part
    if not torch.isfinite(made["scale"]).all() or ("low" in made and not torch.isfinite(made["low"]).all()):
        raise ValueError(
            "a matrix has weights beyond fp16's range: it cannot be quantised; name it in modules_to_not_convert"
        )
    return QuantizedTensor.of(made, inputs)


def _lossless(weight: Tensor) -> Tensor:
    outputs, inputs = weight.shape
    codes = torch.empty(bf12.shape(outputs, inputs), dtype=torch.uint8, device=weight.device)
    for rows in _chunks(outputs, inputs):
        packed = bf12.pack(weight[rows])
        if packed is None:
            raise DoesNotFit("12 bits save nothing: rows are too short, or have too many outliers")
        codes[rows] = packed
    return codes


def multiply(x: Tensor, matrix: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """`x @ matrix.T + bias` by PyTorch's matmul, with a chunk of the matrix's rows dequantised at a time."""
    outputs = [
        F.linear(x, matrix.select(rows).unpack(x.dtype)) for rows in _chunks(matrix.rows, matrix.columns)
    ]
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return y if bias is None else y + bias.to(y.dtype)


def _chunks(outputs: int, inputs: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(inputs, 1))
    return (slice(start, min(start + step, outputs)) for start in range(0, outputs, step))


def _eight(weights_rgn: Tensor) -> dict[str, Tensor]:
    """Symmetric quantisation: the largest magnitude of a group is 127 steps."""
    scale = (weights_rgn.abs().amax(-1) / 127).half()
    codes = (weights_rgn * _inverse(scale.float())[..., None]).round_().clamp_(-127, 127).add_(MIDDLE)
    return {"codes": codes.to(torch.uint8).flatten(1), "scale": scale}


def _four(weights_rgn: Tensor, padding: int) -> dict[str, Tensor]:
    """Asymmetric quantisation: scale and low with the least error among several starts, each refined by least squares.

    Errors are weighted by the magnitude of the weight (plus a small constant), and by 0 in the last `padding` inputs.
    On the embedded demo this reduces the divergence from the original's predictions by 13%, unweighted least squares by
    6%.
    """
    counts = weights_rgn.abs()
    counts += counts.mean(-1, keepdim=True) * _FLOOR
    if padding:
        counts.view(counts.shape[0], -1)[:, -padding:] = 0
    low, high = weights_rgn.amin(-1), weights_rgn.amax(-1)
    fit = _fitting(weights_rgn, counts)
    best, error = (high - low, low), torch.full_like(low, torch.inf)
    for share in _SHARES:
        cut = (high - low) * ((1 - share) / 2)
        line = ((high - low - 2 * cut) / 15, low + cut)
        for _ in range(_ROUNDS):
            line = fit(_codes(weights_rgn, *line), *line)
        line = (line[0].half().float(), line[1].half().float())
        off = torch.addcmul(line[1][..., None], _codes(weights_rgn, *line), line[0][..., None])
        found = (off.sub_(weights_rgn).square_() * counts).sum(-1)
        better = found < error
        best = (torch.where(better, line[0], best[0]), torch.where(better, line[1], best[1]))
        error = torch.where(better, found, error)
    halves = _codes(weights_rgn, *best).to(torch.uint8).flatten(1).unflatten(1, (-1, 2, RUN // 2))
    codes = halves[:, :, 0] | (halves[:, :, 1] << 4)
    return {"codes": codes.flatten(1), "scale": best[0].half(), "low": best[1].half()}


def _codes(weights_rgn: Tensor, scale_rg: Tensor, low_rg: Tensor) -> Tensor:
    """The nearest codes, as floats."""
    inverse = _inverse(scale_rg)
    nearest = torch.addcmul(-(low_rg * inverse)[..., None], weights_rgn, inverse[..., None])
    return nearest.round_().clamp_(0, 15)


def _fitting(weights_rgn: Tensor, counts_rgn: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function from codes to the scale and low of weighted least squares: the line through (code, weight)."""
    total, sums = counts_rgn.sum(-1), (counts_rgn * weights_rgn).sum(-1)

    def fit(codes: Tensor, scale: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        counted = counts_rgn * codes
        first, second = counted.sum(-1), (counted * codes).sum(-1)
        spread = total * second - first * first
        slope = (total * (counted * weights_rgn).sum(-1) - first * sums) / spread
        # If all codes are equal, the line is undetermined.
        usable = (spread > 1e-4 * total * total) & (slope > 0)
        slope = torch.where(usable, slope, scale)
        return slope, torch.where(usable, (sums - slope * first) / total, low)

    return fit


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for a scale of 0."""
    return torch.where(scale > 0, 1 / scale, 0.0)
