"""Weights that MLX quantised, in this library's formats.

A matrix `X` is `X.weight`, uint32 (outputs, inputs * bits / 32): the codes of a row as one string of bits, from the
lowest bit of its first word on; `X.scales` and `X.biases` (outputs, groups). A weight is scale * code + bias.

Source: https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from monoblock.checkpoint.affine_tensors import AffineTensors
from monoblock.checkpoint.mlx_config import MlxDeclaration, kept_bits
from monoblock.checkpoint.packed import Array, PackedForm
from monoblock.checkpoint.quantized_view import as_array
from monoblock.checkpoint.weights import Tensors
from monoblock.errors import CheckpointError, ShapeMismatch

ENDINGS = (".weight", ".scales", ".biases")
_FLOATS = ("F16", "BF16", "F32")


class MlxTensors(AffineTensors):
    """A store's tensors, with MLX's matrices as codes, scale and low."""

    codes_end, endings = ENDINGS[0], ENDINGS

    def __init__(self, tensors: Tensors, how: MlxDeclaration, framework: str):
        self._how = how
        super().__init__(tensors, framework)

    def stems(self) -> list[str]:
        return [name.removesuffix(".scales") for name in self.names if name.endswith(".scales")]

    def checked_shape(self, stem: str) -> tuple[int, int]:
        """(outputs, inputs) of a matrix; ShapeMismatch: its tensors do not have the declared layout."""
        tensors, names = self.tensors, [stem + end for end in ENDINGS]
        if missing := next((name for name in names if name not in self.names), None):
            raise CheckpointError(f"the checkpoint has {stem}.scales, but lacks {missing}: fetch it again")
        (kind, codes), scales, biases = ((tensors.dtype(name), tensors.shape(name)) for name in names)
        form = self._how.of(stem)
        fits = kind == "U32" and scales == biases and scales[0] in _FLOATS and len(codes) == 2
        if fits:
            inputs = codes[1] * 32 // form.bits
            whole = codes[1] * 32 % form.bits == 0 and inputs % form.group == 0 and 0 not in codes
            fits = whole and scales[1] == (codes[0], inputs // form.group)
        if not fits:
            raise ShapeMismatch(
                f"{stem} in {tensors.path(names[0]).name} has weight {kind} {list(codes)}, scales {scales[0]} "
                f"{list(scales[1])} and biases {biases[0]} {list(biases[1])}, which is not the layout of mlx with "
                f"{form.bits} bits and groups of {form.group} inputs"
            )
        return codes[0], codes[1] * 32 // form.bits

    def own_form(self, stem: str) -> PackedForm | None:
        form, kinds = self._how.of(stem), {self.tensors.dtype(f"{stem}{end}") for end in ENDINGS[1:]}
        scales = "F16" if kinds == {"F16"} else "F32"
        return PackedForm(bits=kept_bits(form.bits), group=form.group, low=True, scales=scales)

    def group(self, stem: str) -> int:
        return self._how.of(stem).group

    def codes(self, stem: str, rows: slice) -> Array:
        words = as_array(self.tensors.tensor(f"{stem}.weight"))[rows]
        return unpacked(np.ascontiguousarray(words), self._how.of(stem).bits)

    def scales(self, stem: str) -> Array:
        return self._finite(f"{stem}.scales")

    def lows(self, stem: str) -> Array:
        return self._finite(f"{stem}.biases")

    def _finite(self, name: str) -> Array:
        values = np.asarray(as_array(self.tensors.tensor(name)), np.float32)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{name} in {self.tensors.path(name).name} has numbers that are not finite")
        return values


def unpacked(words: Array, bits: int) -> Array:
    """The codes (rows, m * 32 / bits) of words (rows, m), each row one string of bits."""
    parts = words.astype("<u4", copy=False).view(np.uint8)
    if bits == 8:
        return parts
    if bits in (2, 4):
        each, mask = 8 // bits, np.uint8((1 << bits) - 1)
        codes = np.empty((len(parts), parts.shape[1], each), np.uint8)
        for i in range(each):
            codes[..., i] = parts >> np.uint8(bits * i) & mask
        return codes.reshape(len(parts), -1)
    string = np.unpackbits(parts, axis=1, bitorder="little").reshape(len(parts), -1, bits)
    return np.packbits(string, axis=2, bitorder="little")[..., 0]


def is_mlx(tensors: Tensors, names: Sequence[str]) -> bool:
    """Whether there are matrices as MLX writes them, by names and dtypes."""
    known = frozenset(names)
    stems = (name.removesuffix(".biases") for name in names if name.endswith(".biases"))
    return any(
        f"{stem}.scales" in known and f"{stem}.weight" in known and tensors.dtype(f"{stem}.weight") == "U32"
        for stem in stems
    )
