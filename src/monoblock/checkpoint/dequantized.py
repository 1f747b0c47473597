"""Quantised matrices as float32 matrices, one at a time, for readers that need ordinary weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from monoblock.checkpoint import quantized
from monoblock.checkpoint.keymap import KeyMap
from monoblock.checkpoint.packed import RUN, ZEROS, Array, group_of, scale_values
from monoblock.checkpoint.weights import Shape, Tensors, stored_shapes
from monoblock.errors import CheckpointError, ShapeMismatch


class DequantizedTensors:
    """Tensors with each quantised matrix `X.weight`, of components `X.weight.codes` and so on, as float32:
    scale * code + low, or scale * (code - zero) without a low or with zero points. `fit` gives the matrices' shapes
    first."""

    def __init__(self, tensors: Tensors):
        self._tensors = tensors
        self._parts = {
            part: dict.fromkeys(quantized.component(tensors, part)) for part in quantized.COMPONENTS
        }
        self._plain = dict.fromkeys(quantized.plain(tensors))
        self._shapes: dict[str, Shape] = {}  # (outputs, inputs)
        self._transposed: set[str] = set()
        for name in self._parts["codes"]:
            if name not in self._parts["scale"]:
                raise CheckpointError(
                    f"{tensors.path(f'{name}.codes').name} holds {name} in the lossless format of 12 bits, which only "
                    "the PyTorch classes read: load the folder with one of them, call dequantize(), and save the result"
                )

    def fit(self, keymap: KeyMap, shapes: Mapping[str, Shape], tied: Any) -> None:
        """Set the shapes of the matrices, which padding hides, to those of a model's parameters. Matrices that
        transformers stores transposed, which quantised files do not, are transposed. ShapeMismatch: they do not fit."""
        match = keymap.of(self).match(shapes, self, tied)
        rows = quantized.by_rows(keymap.of(self)).match(shapes, self, tied)
        for canonical, source in match.sources.items():
            expected = dict(zip(source.names, stored_shapes(source.op, shapes[canonical]), strict=True))
            for name in (name for name in source.names if name in self._parts["codes"]):
                shape = expected[name]
                if source != rows.sources[canonical]:
                    self._transposed.add(name)
                    shape = shape[::-1]
                self._shapes[name] = self._checked(name, shape)

    def _checked(self, name: str, shape: Shape) -> Shape:
        codes = self._tensors.shape(f"{name}.codes")
        padded = -(-shape[-1] // RUN) * RUN
        if len(shape) != 2 or codes not in ((shape[0], padded), (shape[0], padded // 2)):
            raise ShapeMismatch(
                f"{name} in {self.path(name).name} has codes {list(codes)}, but the config implies the matrix "
                f"{list(shape)}: do the config and the weights belong together?"
            )
        inputs = getattr(self._tensors, "inputs", None)
        if inputs is not None and (own := inputs(name)) != shape[1]:
            raise ShapeMismatch(
                f"{name} in {self.path(name).name} has {own} inputs, but the config implies {shape[1]}"
            )
        return shape

    def __iter__(self) -> Iterator[str]:
        yield from self._plain
        yield from self._parts["codes"]

    def shape(self, name: str) -> Shape:
        """The shape of a tensor; of a matrix, before `fit`, with padding."""
        if name in self._plain:
            return self._tensors.shape(name)
        found = self._shapes.get(name) or self._tensors.shape(f"{name}.codes")
        return found[::-1] if name in self._transposed else found

    def dtype(self, name: str) -> str:
        """The dtype, by safetensors' name."""
        return self._tensors.dtype(name) if name in self._plain else "F32"

    def path(self, name: str) -> Path:
        """The file that holds it."""
        return self._tensors.path(name if name in self._plain else f"{name}.codes")

    def tensor(self, name: str) -> Array:
        """The tensor itself."""
        if name in self._plain:
            return self._tensors.tensor(name)
        outputs, inputs = self._shapes[name]
        codes, scale, low = (
            np.asarray(self._tensors.tensor(f"{name}.{part}")) if name in self._parts[part] else None
            for part in quantized.COMPONENTS
        )
        assert codes is not None and scale is not None
        padded = -(-inputs // RUN) * RUN
        bits = codes.shape[1] * 8 // padded
        if bits == 4:  # byte j of 64 holds the weights j and j + 64 of a run
            halves = codes.reshape(outputs, -1, RUN // 2)
            codes = np.concatenate((halves & 15, halves >> 4), axis=2).reshape(outputs, padded)
        group = group_of(scale.shape[1], padded, two_level=scale.dtype == np.uint8)
        if group is None:
            raise ShapeMismatch(
                f"{name} in {self.path(name).name} has {scale.shape[1]} scales in rows of {inputs} weights, which is "
                "no known format of quantised weights"
            )
        made = codes.astype(np.float32).reshape(outputs, -1, group)
        zero_points = low is not None and low.dtype == np.uint8 and scale.dtype != np.uint8
        if low is None:
            made -= ZEROS[bits]
        elif zero_points:
            made -= low[..., None]
        made *= scale_values(scale, group, padded)[..., None]
        if low is not None and not zero_points:
            made += scale_values(low, group, padded)[..., None]
        made = made.reshape(outputs, padded)[:, :inputs]
        return np.ascontiguousarray(made.T if name in self._transposed else made)
