"""Modules whose matrix is packed in 8, 4 or 12 bits (formats.py has the formats)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from monoblock.backends.pytorch.kernels.linear import Linear, quantized_dense
from monoblock.backends.pytorch.layers import Conv1D
from monoblock.backends.pytorch.quantization.formats import QuantizedTensor


class QuantizedMatrix(nn.Module):
    """Buffers `codes`, `scale` (8 and 4 bits, else None) and `low` (4 bits, else None) of a matrix (rows, columns) that
    is not trained."""

    codes: Tensor
    scale: Tensor | None
    low: Tensor | None

    def __init__(self, matrix: QuantizedTensor) -> None:
        # Subclasses are kinds of layers too, whose own tensors these take the place of.
        nn.Module.__init__(self)
        codes, scale, low, self.bits, self.group, self.columns = matrix
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("low", low)

    def hold(self, matrix: QuantizedTensor) -> None:
        """Have another matrix: those very tensors."""
        self.codes, self.scale, self.low, self.bits, self.group, self.columns = matrix

    @property
    def quantized(self) -> QuantizedTensor:
        """The matrix."""
        return QuantizedTensor(self.codes, self.scale, self.low, self.bits, self.group, self.columns)

    @property
    def rows(self) -> int:
        """The matrix's rows."""
        return self.codes.shape[0]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (rows, columns) as numbers."""
        return self.quantized.unpack(dtype)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        """`.to(device)` moves all; `.to(dtype)` leaves scales and lows, whose dtype is a part of the format."""
        halves = [self.scale, self.low]
        with torch.no_grad():
            kept = [None if x is None else fn(x.view(torch.int16)).view(torch.float16) for x in halves]
        self.scale = self.low = None
        super()._apply(fn, recurse)
        self.scale, self.low = kept
        return self

    def extra_repr(self) -> str:
        return f"{self.columns}, {self.rows}, bits={self.bits}, group={self.group}"


class ReadOnlyCodes(Tensor):
    """Codes of a packed weight, which is no array of numbers to add to."""

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """RuntimeError: numbers were expected here."""
        raise RuntimeError(
            "this weight is packed and can be neither read nor changed in place (to merge an adapter, say): call the "
            "model's dequantize() first"
        )


class QuantizedLinear(QuantizedMatrix, nn.Linear):
    """`x @ W.T + bias` with a packed W (out_features, in_features); gradients reach x and the bias, which stays as
    it was. An `nn.Linear`, so that adapters are put around it."""

    bias: nn.Parameter | None
    fusible = True  # its product is `quantized_dense`, so that several side by side may be one

    def __init__(self, matrix: QuantizedTensor, bias: Any = None, transposed: bool = False) -> None:
        """`transposed`: what it stands for keeps its weight inputs x outputs."""
        super().__init__(matrix)
        self.transposed = transposed
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The codes, for those who ask for a weight's device and dtype; they cannot be changed through it."""
        return self.codes.as_subclass(ReadOnlyCodes)

    @property
    def in_features(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The width of what comes in."""
        return self.columns

    @property
    def out_features(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The width of what comes out."""
        return self.rows

    def forward(self, input: Tensor) -> Tensor:
        return quantized_dense(input, self.quantized, self.bias)


class QuantizedEmbedding(QuantizedMatrix):
    """A table (num_embeddings, embedding_dim), of which the rows that are looked up are unpacked into `dtype`."""

    def __init__(self, matrix: QuantizedTensor, dtype: torch.dtype) -> None:
        super().__init__(matrix)
        self.dtype = dtype

    @property
    def num_embeddings(self) -> int:
        """The number of rows."""
        return self.rows

    @property
    def embedding_dim(self) -> int:
        """The width of a row."""
        return self.columns

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.flatten().long()  # as indices, numbers of 8 bits would be a mask
        return self.quantized.select(flat).unpack(self.dtype).view(*ids.shape, self.columns)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        # No floating-point buffer shows it what dtype the model is to have.
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


Kind = nn.Linear | nn.Embedding | Conv1D


def matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """A module's weight as rows of outputs."""
    return weight.t() if isinstance(module, Conv1D) else weight


def quantized_module(module: nn.Module, matrix: QuantizedTensor, dtype: torch.dtype) -> QuantizedMatrix:
    """What stands in a linear layer's or an embedding's place, with that matrix; it keeps the layer's bias."""
    if isinstance(module, nn.Embedding):
        made: QuantizedMatrix = QuantizedEmbedding(matrix, dtype)
    else:
        assert isinstance(module, nn.Linear | Conv1D)
        made = QuantizedLinear(matrix, module.bias, isinstance(module, Conv1D))
    return made.train(module.training)


def plain_module(module: QuantizedMatrix, dtype: torch.dtype) -> Kind:
    """The layer or embedding that the packed one stands for, its numbers in `dtype`."""
    weight = module.dequantize(dtype)
    with torch.device("meta"):
        if isinstance(module, QuantizedLinear) and module.transposed:
            made: Kind = Conv1D(module.in_features, module.out_features, bias=False)
            made.register_parameter("bias", module.bias)
            weight = weight.t()
        elif isinstance(module, QuantizedLinear):
            made = Linear(module.in_features, module.out_features, bias=False)
            made.register_parameter("bias", module.bias)
        else:
            made = nn.Embedding(module.rows, module.columns)
    made.weight = nn.Parameter(weight, requires_grad=True)
    return made.train(module.training)


def tied(table: nn.Module, layer: Any) -> Any:
    """The layer with the table's own matrix: one in memory, packed or not."""
    if not isinstance(table, QuantizedMatrix):
        weight = table.get_parameter("weight")
        if isinstance(layer, QuantizedMatrix):
            layer = plain_module(layer, weight.dtype)
        layer.weight = weight
        return layer
    if isinstance(layer, QuantizedLinear):
        layer.hold(table.quantized)
        return layer
    return QuantizedLinear(table.quantized, layer.bias).train(layer.training)
