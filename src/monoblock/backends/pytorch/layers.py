"""Modules without submodules: norms, activations, RoPE, matrices, embeddings; `Leaves` creates the one of a role."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monoblock import roles
from monoblock.backends.pytorch.kernels import dispatch, native_ops, recompute
from monoblock.backends.pytorch.kernels.linear import Linear, product
from monoblock.backends.pytorch.ops import ACT, rotations
from monoblock.backends.pytorch.parts import Named, named
from monoblock.heads import KINDS, HeadSpec
from monoblock.spec import ACTIVATIONS, ArchSpec, Learned, Norm, Rotary


class RMSNorm(Named, nn.RMSNorm):
    """PyTorch's module, with the native kernel for prompts where it is usable."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        if x.shape[-2] > 1 and native_ops.usable(x, self.weight):
            return native_ops.norm(x, self.weight, None, self.eps, rms=True)
        if dispatch.traced():  # the older ONNX exporter knows no RMS norm
            return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight
        return super().forward(x)


class LayerNorm(nn.LayerNorm):
    """PyTorch's module, with the native kernel for prompts where it is usable."""

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-2] > 1 and native_ops.usable(input, self.weight, self.bias):
            return native_ops.norm(input, self.weight, self.bias, self.eps, rms=False)
        if dispatch.transformed():
            return super().forward(input)
        norm = functools.partial(_layer_norm, shape=self.normalized_shape, eps=self.eps)
        return recompute.remember(super().forward(input), norm, input, self.weight, self.bias)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Any, eps: float) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


# Activation functions whose backward pass keeps their output, not their input.
KEEPS_OUTPUT = ("relu", "relu2")

# The gradients of the input, from those of the output and the input, without gradients of their own.
BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "silu": torch.ops.aten.silu_backward,
}


def activate(x: Tensor, act: str) -> Tensor:
    """An activation function with gradients; its values by the native kernel where that is usable."""
    if x.numel() == 0 or x.dtype not in native_ops.DTYPES or native_ops.LIBRARY is None:
        return ACT[act](x)
    if native_ops.usable(x):
        return native_ops.activate(x, ACTIVATIONS.index(act), False)
    trained = dispatch.native(x, gradient=True)
    return _Activated.apply(x, act) if trained else ACT[act](x)  # pyright: ignore[reportReturnType]


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, act: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.act = act
        return activate(x, act)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        (x,) = ctx.saved_tensors
        again = torch.is_grad_enabled()
        if (backward := BACKWARD.get(ctx.act)) is not None and not again:
            return backward(gradients[0], x), None
        with torch.enable_grad():
            x = x if again else x.detach().requires_grad_()
            y = ACT[ctx.act](x)
        return torch.autograd.grad(y, x, gradients[0], create_graph=again)[0], None


class Activation(Named):
    """An elementwise activation by its name in the spec; classes get transformers' names (`NAMES`)."""

    def __init__(self, act: str) -> None:
        super().__init__()
        self.act, self.kind = act, ACTIVATIONS.index(act)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() > 2 and x.shape[-2] > 1 and x.numel() and native_ops.usable(x):
            return native_ops.activate(x, self.kind, False)
        if self.act in KEEPS_OUTPUT or dispatch.transformed():
            return ACT[self.act](x)
        return recompute.remember(activate(x, self.act), functools.partial(activate, act=self.act), x)

    def extra_repr(self) -> str:
        return self.act


class RotaryEmbedding(Named):
    """cos and sin of the RoPE angles of positions (b, s): two tensors (b, 1, s, channels)."""

    def __init__(self, rotary: Rotary) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return rotations(position_ids, self.rotary, x.dtype)


class Conv1D(nn.Module):
    """`x @ weight + bias` with a weight (inputs, outputs), stored transposed in memory, as products need it, until it
    is sharded.

    isinstance() reports transformers' Conv1D once that is imported: adapters choose their layer class by it.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()  # `super()` needs the name `__class__`, defined below
        self.nx, self.nf = inputs, outputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs).t())
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.empty(outputs)) if bias else None)

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        theirs = sys.modules.get("transformers.pytorch_utils")
        return Conv1D if theirs is None else theirs.Conv1D

    def __reduce_ex__(self, protocol: Any) -> Any:
        # `__class__` may be transformers' class.
        return Conv1D.__new__, (Conv1D,), self.__dict__.copy()

    @property
    def in_features(self) -> int:
        """The number of inputs."""
        return self.nx

    @property
    def out_features(self) -> int:
        """The number of outputs."""
        return self.nf

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t()
        return product(x, weight, self.bias)(x, weight, self.bias)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As `torch.nn.Module`'s. FSDP calls it with `recurse=False` before it shards a module's parameters, which must
        be contiguous: in a process group the weight is made contiguous first."""
        grouped = not recurse and torch.distributed.is_available() and torch.distributed.is_initialized()
        if grouped and type(self.weight) is nn.Parameter and not self.weight.is_contiguous():
            self.weight.data = self.weight.data.contiguous()
        return super().named_parameters(prefix, recurse, remove_duplicate)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:  # files store contiguous tensors
            destination[prefix + "weight"] = destination[prefix + "weight"].contiguous()

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}"


# transformers' class names of activations.
NAMES = {
    "gelu": "GELUActivation",
    "gelu_tanh": "NewGELUActivation",
    "quick_gelu": "QuickGELUActivation",
    "relu": "ReLU",
    "relu2": "ReLUSquaredActivation",
    "silu": "SiLUActivation",
}


def make_norm(norm: Norm, width: int, name: str | None = None) -> nn.Module:
    """The norm as a module."""
    if norm.kind == "rms":
        return named(RMSNorm, name or "RMSNorm")(width, eps=norm.eps)
    return LayerNorm(width, eps=norm.eps, bias=norm.bias)


class Leaves:
    """Creates the module of a role; None if the model has none."""

    def __init__(self, spec: ArchSpec, head: HeadSpec | None) -> None:
        self.spec, self.head = spec, head

    def __call__(self, role: str, classes: Mapping[str, str]) -> nn.Module | None:
        spec, head, drop = self.spec, self.head, self.spec.dropout
        if (sizes := roles.matrix(role, spec, head)) is not None:
            return (Conv1D if roles.transposed(role, classes) else Linear)(*sizes)
        if (norm := roles.norm(role, spec, head)) is not None:
            return make_norm(*norm, classes.get("norm"))
        if role.startswith("head_"):
            return self._head(role)
        if (table := roles.table(role, spec)) is not None:
            return nn.Embedding(*table, padding_idx=self._padding(role))
        match role:
            case "rotary":
                rotary = spec.position(Rotary)
                return rotary and named(RotaryEmbedding, classes.get("rotary", "RotaryEmbedding"))(rotary)
            case "act":
                return named(Activation, classes.get("act", NAMES[spec.mlp.act]))(spec.mlp.act)
            case "embed_drop":
                return nn.Dropout(drop.embed)
            case "attn_drop":
                return nn.Dropout(drop.attention)
            case "out_drop" | "mlp_drop" | "layer_drop":
                return nn.Dropout(drop.residual)
            case _ if role in roles.OPTIONAL:
                return None
            case _:
                raise ValueError(f"no module plays the role {role!r}")

    def _padding(self, role: str) -> int | None:
        """The row of an embedding that gets no gradient: the padding token, and its position."""
        learned = self.spec.position(Learned)
        if learned is None or learned.pad_id is None:
            return None
        return {"embed": learned.pad_id, "pos_embed": learned.offset - 1}.get(role)

    def _head(self, role: str) -> nn.Module | None:
        spec, head = self.spec, self.head
        assert head is not None
        kind, summary = KINDS[head.kind], head.summary
        match role:
            case "head_out":
                size = head.size(spec.vocab)
                return None if size is None else Linear(spec.width, size, bias=kind.bias)
            case "head_drop":
                return nn.Dropout(head.dropout)
            case "head_summary" if summary:  # without a size
                return nn.Identity()
            case "head_act":
                return nn.Identity() if summary and not summary.tanh else nn.Tanh()
            case "head_drop_in" if summary:
                return nn.Dropout(summary.dropout_in) if summary.dropout_in else nn.Identity()
            case "head_drop_out" if summary:
                return nn.Dropout(summary.dropout_out) if summary.dropout_out else nn.Identity()
            case _:
                return None
