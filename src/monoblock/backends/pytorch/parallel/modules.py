"""The modules of a sharded model that communicate; `connect` puts them into a model after its weights are loaded.

They derive from the modules that they replace, quantised or not, and share their tensors. All others work on a shard as
they are: the spec of the model has the shard's heads and channels.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monoblock.backends.pytorch.base import ModelBase
from monoblock.backends.pytorch.kernels import dispatch
from monoblock.backends.pytorch.kernels.linear import dense, quantized_dense
from monoblock.backends.pytorch.layers import Conv1D
from monoblock.backends.pytorch.model import Attention, ForwardContext, Mlp, Widen
from monoblock.backends.pytorch.parallel.groups import TensorGroup, added, copied, joined, summed
from monoblock.backends.pytorch.parts import Part, named, replace
from monoblock.backends.pytorch.quantization.modules import QuantizedMatrix
from monoblock.heads import KINDS


class ShardedAttention(Attention):
    """The attention of some heads; its output projection sums over the processes."""

    tensor_group: TensorGroup

    def forward(self, x_bsw: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor | None]:
        return super().forward(copied(x_bsw, self.tensor_group), context)


class ShardedMlp(Mlp):
    """Some channels of the MLP; its down projection sums over the processes."""

    tensor_group: TensorGroup

    def forward(self, x_bsw: Tensor, residual_bsw: Tensor | None = None) -> Tensor:
        return super().forward(copied(x_bsw, self.tensor_group), residual_bsw)


class ShardedWiden(Widen):
    """Some channels of the up projection."""

    tensor_group: TensorGroup

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(copied(x, self.tensor_group))


_PARTS: dict[type[Part], type[Part]] = {
    Attention: ShardedAttention,
    Mlp: ShardedMlp,
    Widen: ShardedWiden,
}


class _Leaf:
    """The base of the modules without children; added in front of a module's class by `_sharded`."""

    tensor_group: TensorGroup

    def __reduce_ex__(self, protocol: Any) -> Any:
        del protocol
        return _blank, (type(self),), self.__dict__.copy()


class RowParallel(_Leaf):
    """A matrix of some inputs: the products of all processes are summed, and the bias is added once."""

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        if isinstance(module, QuantizedMatrix):
            y = quantized_dense(x, module.quantized, None)
        else:
            y = dense(x, module.weight.t() if issubclass(type(self), Conv1D) else module.weight, None)
        y = summed(y, self.tensor_group)
        bias: Any = module.bias
        return y if bias is None else y + bias


class VocabularyTable(_Leaf):
    """Rows of the token embedding from `first` on; ids of other rows give 0, which the sum over the processes
    replaces."""

    first: int
    vocab: int

    def forward(self, ids: Tensor) -> Tensor:
        readable = ids.device.type == "cpu" and dispatch.readable(ids) and ids.numel()
        if readable and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab:
            raise IndexError(f"token ids must be from 0 to {self.vocab - 1}")
        rows: int = self.num_embeddings  # pyright: ignore[reportAttributeAccessIssue]
        own = ids - self.first
        outside = (own < 0) | (own >= rows)
        x = super().forward(own.clamp(0, rows - 1))  # pyright: ignore[reportAttributeAccessIssue]
        return summed(x.masked_fill(outside[..., None], 0), self.tensor_group)


class VocabularyHead(_Leaf):
    """Some rows of the projection to the vocabulary; the logits of all processes are joined."""

    shards: list[int]

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(copied(x, self.tensor_group))  # pyright: ignore[reportAttributeAccessIssue]
        return joined(y, self.shards, self.tensor_group)


class HeadNorm(_Leaf):
    """A norm of each head of q or k, whose weights all heads share: their gradients are summed."""

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        weight, bias = module.weight, getattr(module, "bias", None)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return super().forward(x)  # pyright: ignore[reportAttributeAccessIssue]
        weight = copied(weight, self.tensor_group)
        if isinstance(module, nn.RMSNorm):
            return F.rms_norm(x, module.normalized_shape, weight, module.eps)
        bias = None if bias is None else copied(bias, self.tensor_group)
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


class JointNorm(_Leaf):
    """A norm of all heads of q or k jointly, of which this process has some: the moments are summed."""

    def forward(self, x: Tensor) -> Tensor:
        module, group = self, self.tensor_group
        norm: Any = module
        count, rms = x.shape[-1] * group.size, isinstance(module, nn.RMSNorm)
        if not rms:
            x = x - added(x.sum(-1, keepdim=True), group) / count
        x = x * (added(x.square().sum(-1, keepdim=True), group) / count + norm.eps).rsqrt() * norm.weight
        return x if rms or norm.bias is None else x + norm.bias


@functools.cache
def _sharded(kind: type[_Leaf], base: type[nn.Module]) -> Any:
    """The class of a module, communicating; under the same name, by which tools know it."""
    return type(base.__name__, (kind, base), {"__module__": __name__, "__doc__": kind.__doc__})


def _blank(kind: Any) -> Any:
    return kind.__new__(kind)


def _replace(model: ModelBase, path: str, kind: type[_Leaf], **values: Any) -> None:
    """Replace a module by a communicating one with the same contents, unless it is one already."""
    module = model.get_submodule(path)
    base = type(module)
    if issubclass(base, kind):
        return
    made = _blank(_sharded(kind, base))
    made.__dict__.update(module.__dict__, **values)
    replace(model, path, made)


def connect(model: ModelBase, group: TensorGroup) -> None:
    """Make the modules of a model with the weights of a shard communicate. Again after a module was replaced: those
    that do already are left as they are."""
    for part in model.modules():
        for plain, communicating in _PARTS.items():
            if isinstance(part, plain) and not isinstance(part, communicating):
                part.__class__ = named(communicating, type(part).__name__)
                part.__dict__["tensor_group"] = group
    paths, vocab = model.module_paths, model.spec.vocab
    bounds = [vocab * rank // group.size for rank in range(group.size + 1)]
    norms = (
        None if (qk := model.spec.attention.qk_norm) is None else HeadNorm if qk.span == "head" else JointNorm
    )
    for layer in range(model.spec.layers):
        for role in ("out", "down"):
            _replace(model, model.module_path(role, layer), RowParallel, tensor_group=group)
        for role in ("q_norm", "k_norm") if norms is not None else ():
            _replace(model, model.module_path(role, layer), norms or HeadNorm, tensor_group=group)
    _replace(
        model, paths["embed"], VocabularyTable, tensor_group=group, first=bounds[group.rank], vocab=vocab
    )
    if model.head_spec is not None and KINDS[model.head_spec.kind].size == "vocab":
        shards = [end - start for start, end in itertools.pairwise(bounds)]
        _replace(model, paths["head_out"], VocabularyHead, tensor_group=group, shards=shards)


def shrink_tables(model: ModelBase, group: TensorGroup) -> None:
    """Give the tables of the vocabulary of a model on the meta device the shapes of this process's rows."""
    vocab = model.spec.vocab
    first, end = (vocab * (group.rank + i) // group.size for i in range(2))
    embed: Any = model.get_input_embeddings()
    if embed.num_embeddings == vocab:  # not yet, by the bare model inside
        embed.weight = nn.Parameter(embed.weight[first:end])
        embed.num_embeddings = end - first
        if embed.padding_idx is not None:
            embed.padding_idx = embed.padding_idx - first if first <= embed.padding_idx < end else None
    out: Any = model.get_output_embeddings()
    if out is not None:
        out.weight = nn.Parameter(out.weight[first:end])
        out.out_features = end - first
        if out.bias is not None:
            out.bias = nn.Parameter(out.bias[first:end])
            if model.has("lm_head"):
                model.role("lm_head").register_parameter("bias", out.bias)
