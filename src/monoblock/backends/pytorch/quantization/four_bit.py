"""Matrices that stay in the 4 bits of bitsandbytes, under adapters that are trained (QLoRA, arXiv 2305.14314).

A product dequantises its matrix to bfloat16, with the values of `checkpoint/bnb_tensors.py` to the bit, and frees it;
the backward pass does so again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monoblock.backends.pytorch import loading
from monoblock.backends.pytorch.base import ModelBase
from monoblock.backends.pytorch.kernels import dispatch
from monoblock.backends.pytorch.kernels.linear import Linear, dense, product
from monoblock.backends.pytorch.layers import Conv1D
from monoblock.backends.pytorch.parts import replace
from monoblock.backends.pytorch.quantization.modules import ReadOnlyCodes
from monoblock.checkpoint.bnb_tensors import FourBitTensors
from monoblock.quantization import BitsAndBytesConfig, QuantizationConfig

_CHUNK = 1 << 19  # bytes of codes that are dequantised at a time; a multiple of all block sizes
# The buffers of a matrix, in the order of FourBitMatrix.
_BUFFERS = ("codes", "values", "absmax", "nested_values", "nested_absmax")


class FourBitMatrix(NamedTuple):
    """A matrix (rows, columns): `codes` uint8, two to a byte, of `values` float32 (16,), and `absmax`, a scale for each
    `block` consecutive weights: float32, or uint8 codes of `nested_values` (256,) times `nested_absmax`, plus
    `offset`."""

    codes: Tensor
    values: Tensor
    absmax: Tensor
    nested_values: Tensor | None
    nested_absmax: Tensor | None
    rows: int
    columns: int
    block: int
    nested_block: int
    offset: float

    def scales(self) -> Tensor:
        """The scale of each block, float32."""
        if self.nested_values is None or self.nested_absmax is None:
            return self.absmax
        outer = self.nested_absmax.repeat_interleave(self.nested_block)[: len(self.absmax)]
        return self.nested_values.index_select(0, self.absmax.int()) * outer + self.offset

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The matrix, rounded to bfloat16, in a dtype."""
        count, block = self.rows * self.columns, self.block
        # The two values of each byte: the high bits come first.
        pairs = torch.stack((self.values.repeat_interleave(16), self.values.repeat(16)), 1)
        made, scales = torch.empty(count, dtype=dtype, device=self.codes.device), self.scales()
        for first in range(0, len(self.codes), _CHUNK):
            weights = pairs.index_select(0, self.codes[first : first + _CHUNK].int()).view(-1)
            own = scales[2 * first // block :][: -(-len(weights) // block)]
            weights = F.pad(weights, (0, -len(weights) % block)).view(-1, block).mul_(own[:, None]).view(-1)
            part = made[2 * first : 2 * (first + _CHUNK)]
            part.copy_(weights[: len(part)].to(torch.bfloat16))
        return made.view(self.rows, self.columns)


class _Product(torch.autograd.Function):
    """`x @ matrix.T + bias`; of the matrix only the codes are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, matrix: FourBitMatrix) -> Tensor:
        ctx.matrix, ctx.bias_dtype = matrix, None if bias is None else bias.dtype
        weight = matrix.unpack(x.dtype)
        with torch.enable_grad():  # the kernel that the same product of a plain matrix takes
            multiply = product(x.detach().requires_grad_(ctx.needs_input_grad[0]), weight, bias)
        with torch.no_grad():
            return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = dense(gradient, ctx.matrix.unpack(gradient.dtype).t(), None)
        if ctx.needs_input_grad[1]:
            to_bias = gradient.reshape(-1, ctx.matrix.rows).sum(0).to(ctx.bias_dtype)
        return to_x, to_bias, None


class FourBitLinear(nn.Linear):
    """`x @ W.T + bias` with W (out_features, in_features) in 4 bits; gradients reach x and the bias. A subclass of
    `nn.Linear`, so that adapters can wrap it; they have the dtype that W is dequantised to."""

    bias: nn.Parameter | None

    def __init__(self, matrix: FourBitMatrix, bias: Any, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # without nn.Linear's initialisation
        for name, tensor in zip(_BUFFERS, matrix, strict=False):
            self.register_buffer(name, cast(Tensor | None, tensor))
        self._form, self.dtype = matrix[len(_BUFFERS) :], dtype
        self.register_parameter("bias", bias)

    @property
    def matrix(self) -> FourBitMatrix:
        """The matrix."""
        return FourBitMatrix(*(getattr(self, name) for name in _BUFFERS), *self._form)  # pyright: ignore

    @property
    def in_features(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The number of inputs."""
        return self.matrix.columns

    @property
    def out_features(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The number of outputs."""
        return self.matrix.rows

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """NaNs without memory, read-only, for code that reads a weight's shape, device and dtype."""
        codes: Any = self.codes
        stand_in = torch.full((1, 1), torch.nan, dtype=self.dtype, device=codes.device)
        return stand_in.expand(self.out_features, self.in_features).as_subclass(ReadOnlyCodes)

    def forward(self, input: Tensor) -> Tensor:
        if dispatch.transformed():
            return F.linear(input, self.matrix.unpack(input.dtype), self.bias)
        return _Product.apply(input, self.bias, self.matrix)  # pyright: ignore[reportReturnType]

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        """`.to(device)` moves all tensors; `.to(dtype)` changes the dtype of the computation only."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        held = {name: self._buffers.pop(name) for name in _BUFFERS}
        super()._apply(fn, recurse)
        for name, tensor in held.items():
            moved = None if tensor is None else fn(tensor.view(torch.uint8)).view(tensor.dtype)
            self.register_buffer(name, moved)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, block={self.matrix.block}"


def plain(module: FourBitLinear) -> nn.Linear:
    """The layer with the dequantised matrix."""
    with torch.device("meta"):
        made = Linear(module.in_features, module.out_features, bias=False)
    made.weight = nn.Parameter(module.matrix.unpack(module.dtype))
    made.register_parameter("bias", module.bias)
    return made.train(module.training)


class FourBitKeeper:
    """Keeps matrices in the 4 bits of their files while a model is loaded (`put`)."""

    def __init__(self, model: ModelBase, store: FourBitTensors) -> None:
        self.model, self.store, self.kinds = model, store, set[str]()
        store.noted = True

    def put(self, path: str, tensor: Tensor) -> None:
        """Assign the tensor to the parameter of that name, or replace its layer by one in 4 bits."""
        name, _, last = path.rpartition(".")
        module = self.model.get_submodule(name)
        file = self._in_file(path) if last == "weight" and isinstance(module, nn.Linear) else None
        if file is None or isinstance(module, Conv1D):
            loading.assign(self.model, path, tensor)
            return
        parts = self.store.parts(file)
        if (parts["rows"], parts["columns"]) != tuple(tensor.shape):
            loading.assign(self.model, path, tensor)
            return
        self.kinds.add(parts.pop("kind"))
        device = tensor.device
        held: dict[str, Any] = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in parts.items()}
        assert isinstance(module, nn.Linear)
        made = FourBitLinear(FourBitMatrix(**held), module.bias, tensor.dtype)
        replace(self.model, name, made.train(module.training))

    def _in_file(self, path: str) -> str | None:
        """The name of a 4-bit matrix in the files, whose prefix may be another one; None if it is not in 4 bits."""
        names = self.store.four_bit
        if path in names:
            return path
        found = [name for name in names if name.endswith(f".{path}") or path.endswith(f".{name}")]
        return found[0] if len(found) == 1 else None

    def finish(self) -> None:
        """Record how the weights are quantised."""
        if self.kinds:
            kind = next(iter(self.kinds))
            self.model.quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind)


def keeper(model: ModelBase, store: Any, asked: QuantizationConfig | None) -> FourBitKeeper | None:
    """A FourBitKeeper, if the files have 4-bit matrices and 4 bits of bitsandbytes are asked for."""
    if isinstance(store, FourBitTensors) and isinstance(asked, BitsAndBytesConfig) and asked.load_in_4bit:
        return FourBitKeeper(model, store)
    return None
