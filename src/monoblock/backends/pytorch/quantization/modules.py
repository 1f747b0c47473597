"""Modules with a matrix in 8, 4 or 12 bits (formats.py documents the formats)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from monoblock.backends.pytorch.kernels.linear import Linear, quantized_dense
from monoblock.backends.pytorch.layers import Conv1D
from monoblock.backends.pytorch.quantization.formats import QuantizedTensor


class QuantizedMatrix(nn.Module):
    """Buffers `codes`, `scale` and `low` (lows or zero points; None where the format has none) of a matrix (rows,
    columns) that is not trained."""

    codes: Tensor
    scale: Tensor | None
    low: Tensor | None

    def __init__(self, matrix: QuantizedTensor) -> None:
        # Skips the initialisers of the layer classes that subclasses also derive from.
        nn.Module.__init__(self)
        codes, scale, low, self.bits, self.group, self.columns = matrix
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("low", low)

    def hold(self, matrix: QuantizedTensor) -> None:
        """Replace the matrix; shares the given tensors."""
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
        """The dequantised matrix (rows, columns)."""
        return self.quantized.unpack(dtype)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        """`.to(device)` moves all tensors; `.to(dtype)` does not convert scale and low, whose dtype is part of the
        format."""
        stored = [self.scale, self.low]
        with torch.no_grad():
            kept = [None if x is None else fn(x.view(torch.uint8)).view(x.dtype) for x in stored]
        self.scale = self.low = None
        super()._apply(fn, recurse)
        self.scale, self.low = kept
        return self

    def extra_repr(self) -> str:
        return f"{self.columns}, {self.rows}, bits={self.bits}, group={self.group}"


class ReadOnlyCodes(Tensor):
    """The codes of a quantised weight; `data` raises, so that code which modifies weights fails with a clear error."""

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """RuntimeError: the weight is quantised."""
        raise RuntimeError(
            "this weight is quantised and can be neither read nor modified in place (for example to merge an "
            "adapter): call the model's dequantize() first"
        )


class QuantizedLinear(QuantizedMatrix, nn.Linear):
    """`x @ W.T + bias` with a quantised W (out_features, in_features) and an unquantised bias; gradients reach x and
    the bias. A subclass of `nn.Linear`, so that adapters can wrap it."""

    bias: nn.Parameter | None
    fusible = True  # its product is `quantized_dense`, so that adjacent ones can be fused

    def __init__(self, matrix: QuantizedTensor, bias: Any = None, transposed: bool = False) -> None:
        """`transposed`: the original layer stores its weight as (inputs, outputs)."""
        super().__init__(matrix)
        self.transposed = transposed
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The codes, read-only, for code that reads a weight's device and dtype."""
        return self.codes.as_subclass(ReadOnlyCodes)

    @property
    def in_features(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The number of inputs."""
        return self.columns

    @property
    def out_features(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The number of outputs."""
        return self.rows

    def forward(self, input: Tensor) -> Tensor:
        return quantized_dense(input, self.quantized, self.bias)


class QuantizedEmbedding(QuantizedMatrix):
    """A table (num_embeddings, embedding_dim), whose looked-up rows are dequantised to `dtype`."""

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
        flat = ids.flatten().long()  # uint8 indices would be interpreted as a mask
        return self.quantized.select(flat).unpack(self.dtype).view(*ids.shape, self.columns)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        # There is no floating-point buffer to follow a change of the model's dtype.
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


Kind = nn.Linear | nn.Embedding | Conv1D


def matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """A module's weight as (outputs, inputs)."""
    return weight.t() if isinstance(module, Conv1D) else weight


def quantized_module(module: nn.Module, matrix: QuantizedTensor, dtype: torch.dtype) -> QuantizedMatrix:
    """The replacement of a linear layer or an embedding, with the quantised matrix and the layer's bias."""
    if isinstance(module, nn.Embedding):
        made: QuantizedMatrix = QuantizedEmbedding(matrix, dtype)
    else:
        assert isinstance(module, nn.Linear | Conv1D)
        made = QuantizedLinear(matrix, module.bias, isinstance(module, Conv1D))
    return made.train(module.training)


def plain_module(module: QuantizedMatrix, dtype: torch.dtype) -> Kind:
    """The unquantised layer or embedding, with the dequantised weight in `dtype`."""
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
    """The layer with the table's matrix as a shared weight, quantised or not."""
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
