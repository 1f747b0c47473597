"""One attention, one MLP, one block, for every family: they interpret an `ArchSpec`.

    x -> norm1 -> attention -> + -> norm2 -> MLP -> +      (placement "pre")
    x -> attention -> + -> norm1 -> MLP -> + -> norm2      (placement "post")

Each part looks up its submodules by role at every call, so that replaced, wrapped and hooked modules take effect.
The module tree (names, classes, nesting) comes from the family's table. Shape suffixes: b batch, s tokens, w width, h
heads, g key/value heads, d head width.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from monoblock.backends.pytorch.cache import Cache
from monoblock.backends.pytorch.kernels import attention, dispatch, linear, native_ops
from monoblock.backends.pytorch.layers import Activation
from monoblock.backends.pytorch.ops import (
    ACT,
    Kernel,
    RelativeBias,
    Scope,
    relative_position_bucket,
    rotate,
    rotations,
)
from monoblock.backends.pytorch.parts import Part
from monoblock.positions import is_dynamic
from monoblock.spec import Alibi, ArchSpec, Buckets, Rotary


@dataclass
class ForwardContext:
    """The inputs of one forward pass that all blocks share.

    `positions_bs` are those of the new tokens, `key_positions_bk` those of all keys; a first axis of 1 broadcasts over
    the rows. `head_mask` (layers, 1, h, 1, 1) scales each head's weights. Layers append to `attentions` and
    `hidden_states` if those are lists. `checkpointing`: keywords of `torch.utils.checkpoint.checkpoint`, if activations
    are recomputed in the backward pass. `keep`: only the last `keep` tokens of the output are needed. `one_token`
    replaces everything between the projections of an attention layer: RoPE, cache and kernel.
    """

    scope: Scope
    positions_bs: Tensor
    key_positions_bk: Tensor
    cache: Cache | None = None
    attentions: list[Tensor] | None = None
    hidden_states: list[Tensor] | None = None
    head_mask: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    keep: int | None = None
    checkpointing: dict[str, Any] | None = None
    one_token: Callable[[Attention, Tensor, Tensor, Tensor], Tensor] | None = None

    def kept(self, x: Tensor) -> Tensor:
        """The last `keep` tokens of x (b, s, ..)."""
        return x if self.keep is None else x[:, -self.keep :]

    def after(self, given: Any) -> Tensor:
        """The hidden states of a layer's output (a tensor, or first in a tuple); appended to `hidden_states` if
        requested."""
        x = given[0] if isinstance(given, (tuple, list)) else given
        if self.hidden_states is not None:
            self.hidden_states.append(x)
        return x


# ---------------------------------------------------------------------------- attention


class Attention(Part):
    """Self-attention with grouped heads, clipping, q/k norms, RoPE, ALiBi and windows."""

    def prepare(self, spec: ArchSpec, layer: int) -> None:
        """Read this layer's options from the spec."""
        self.spec, self.layer, self.window = spec.attention, layer, spec.windows[layer]
        att = spec.attention
        self.sizes = [att.heads * att.head_dim, att.kv_heads * att.head_dim, att.kv_heads * att.head_dim]
        self.by_head = att.qk_norm is not None and att.qk_norm.span == "head"
        rotary = spec.position(Rotary)
        # With dynamic scaling the angles of all keys change with the length: keys are cached before RoPE.
        self.late_rotary = rotary if is_dynamic(rotary) else None
        self.kernel = Kernel(scale=att.scale, softcap=att.softcap, dropout=spec.dropout.attention)
        self.kernel_at_rest = replace(self.kernel, dropout=0.0)
        self.implementation = "sdpa"

    def forward(self, x_bsw: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor | None]:
        if self.has("qkv_by_head"):  # a head's query, key and value are adjacent
            qkv = self.role("qkv_by_head")(x_bsw).unflatten(-1, (self.spec.heads, 3, self.spec.head_dim))
            q, k, v = qkv.unbind(3)
        else:
            whole = self.role("qkv")(x_bsw) if self.has("qkv") else linear.fused(x_bsw, self, ("q", "k", "v"))
            if whole is not None:
                q, k, v = whole.split(self.sizes, dim=-1)
            else:
                q, k, v = self.role("q")(x_bsw), self.role("k")(x_bsw), self.role("v")(x_bsw)
        q, k, v = self.heads(q, k, v)
        if context.one_token is not None:
            y, weights = context.one_token(self, q, k, v), None
        else:
            y, weights = self.attend(q, k, v, context)
        y = self.role("out")(y)
        return (self.role("out_drop")(y) if self.has("out_drop") else y), weights

    def heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (b, h, s, d), keys and values (b, g, s, d), clipped and normed, from projections (b, s, h * d) or
        (b, s, h, d)."""
        att = self.spec
        if att.clip is not None:
            q, k, v = (x.clamp(-att.clip, att.clip) for x in (q, k, v))
        if att.qk_norm is not None and not self.by_head:
            q, k = self.role("q_norm")(q.flatten(2)), self.role("k_norm")(k.flatten(2))
        q, k, v = (x.flatten(2).unflatten(-1, (-1, att.head_dim)).transpose(1, 2) for x in (q, k, v))
        if self.by_head:
            q, k = self.role("q_norm")(q), self.role("k_norm")(k)
        return q, k, v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor | None]:
        """RoPE, cache and kernel: the heads' output (b, s, h * d), and the attention weights if requested."""
        if context.cos is not None and context.sin is not None:
            q = rotate(q, context.cos, context.sin)
            k = k if self.late_rotary else rotate(k, context.cos, context.sin)
        if context.cache is not None:
            k, v = context.cache.update(k, v, self.layer)
        if self.late_rotary:
            cos, sin = rotations(context.key_positions_bk[:, -k.shape[2] :], self.late_rotary, k.dtype)
            k = rotate(k, cos, sin)
        scope = context.scope if self.window is None else context.scope.with_window(self.window, k.shape[2])
        if context.keep is not None:
            q, scope = q[:, :, -context.keep :], scope.last(context.keep)
        kernel = self.kernel if self.training else self.kernel_at_rest
        if context.attentions is not None:
            out, weights = attention.attend_eager(q, k, v, scope, kernel)
        else:
            out, weights = attention.IMPLEMENTATIONS[self.implementation](q, k, v, scope, kernel), None
        if context.head_mask is not None:
            # Scaling a head's weights scales its output.
            out = out * context.head_mask[self.layer]
            weights = None if weights is None else weights * context.head_mask[self.layer]
        if context.attentions is not None and weights is not None:
            context.attentions.append(weights)
        return out.transpose(1, 2).flatten(2), weights


class Wrapper(Part):
    """Calls the attention module that it contains."""

    def forward(self, x_bsw: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor | None]:
        return self.role("attention")(x_bsw, context)


class AttentionNorm(Part):
    """`norm(x + dropout(attention(x)))`."""

    def forward(self, x: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor | None]:
        y, weights = self.role("attention")(x, context)
        return self.role("norm1")(self.role("out_drop")(y) + context.kept(x)), weights


# ---------------------------------------------------------------------------- MLP


class Mlp(Part):
    """`down(act(up(x)))`, or gated: `down(act(gate(x)) * up(x))`; with a residual, plus dropout and addition."""

    def prepare(self, spec: ArchSpec, layer: int) -> None:
        """Read the MLP's options from the spec."""
        del layer
        self.gated, self.residual_dropout = spec.mlp.gated, spec.dropout.residual

    def forward(self, x_bsw: Tensor, residual_bsw: Tensor | None = None) -> Tensor:
        act, hidden = self.role("act"), None
        if not self.gated:
            hidden = act(self.role("up")(x_bsw))
        elif type(act).forward is Activation.forward and dispatch.altered(act) is None:
            whole = linear.fused(x_bsw, self, ("gate", "up"))
            hidden = None if whole is None else gated(whole, act)
        if hidden is None:
            hidden = act(self.role("gate")(x_bsw)) * self.role("up")(x_bsw)
        y = self.role("down")(hidden)
        if residual_bsw is not None:
            return F.dropout(y, self.residual_dropout, self.training) + residual_bsw
        return self.role("mlp_drop")(y) if self.has("mlp_drop") else y


def gated(whole: Tensor, act: Activation) -> Tensor:
    """`act(gate) * up` of [gate | up], (..., 2 * the MLP's width)."""
    if whole.shape[-2] > 1 and whole.numel() and native_ops.usable(whole):
        return native_ops.activate(whole, act.kind, True)
    gate, up = whole.chunk(2, dim=-1)
    return ACT[act.act](gate) * up


class Widen(Part):
    """`act(up(x))`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.role("act")(self.role("up")(x))


class Narrow(Part):
    """`norm(dropout(down(x)) + residual)`."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.role("norm2")(self.role("mlp_drop")(self.role("down")(x)) + residual)


# ---------------------------------------------------------------------------- block


class Block(Part):
    """Attention and MLP, each with its residual; the norm before the sub-layer or after the sum."""

    def prepare(self, spec: ArchSpec, layer: int) -> None:
        """Choose the order of norms and sub-layers."""
        del layer
        self.order = "nested" if self.has("attention_norm") else spec.placement
        self.attention_role = next(
            role for role in ("attention", "wrapper", "attention_norm") if self.has(role)
        )
        self.adds = self.has("mlp_add")

    def forward(self, x: Tensor, context: ForwardContext) -> Any:
        if self.order == "pre":  # norms before the sub-layers
            y, weights = self.role(self.attention_role)(self.role("norm1")(x), context)
            if self.adds:
                x = context.kept(x) + self.dropped(y)
                x = self.role("mlp_add")(self.role("norm2")(x), x)
            else:
                x = context.kept(x) + y
                x = x + self.dropped(self.role("mlp")(self.role("norm2")(x)))
        elif self.order == "post":  # norms after the sums
            y, weights = self.role(self.attention_role)(x, context)
            x = self.role("norm1")(context.kept(x) + y)
            x = self.role("norm2")(x + self.role("mlp")(x))
        else:  # sub-layers that include residual and norm
            x, weights = self.role("attention_norm")(x, context)
            x = self.role("narrow")(self.role("widen")(x), x)
        return (x, weights) if self.tuples else x

    def dropped(self, y: Tensor) -> Tensor:
        """y after the block's own dropout, if it has one."""
        return self.role("layer_drop")(y) if self.has("layer_drop") else y


# ---------------------------------------------------------------------------- model


class Embeddings(Part):
    """Embeds token ids (or takes vectors); adds position embeddings; norm and dropout."""

    def prepare(self, spec: ArchSpec, layer: int) -> None:
        """Store the spec."""
        del layer
        self.spec = spec

    def forward(self, tokens: Tensor, context: ForwardContext) -> Tensor:
        return positioned(self, self.role("embed")(tokens) if tokens.dim() == 2 else tokens, context)


def positioned(part: Any, x_bsw: Tensor, context: ForwardContext) -> Tensor:
    """Embedded tokens plus position embeddings, with norm and dropout; the gradient is scaled by the spec's
    `embed_gradient`."""
    spec: ArchSpec = part.spec
    if part.has("pos_embed"):
        x_bsw = x_bsw + part.role("pos_embed")(context.positions_bs)
    if part.has("embed_norm"):
        x_bsw = part.role("embed_norm")(x_bsw)
    if (share := spec.embed_gradient) != 1.0:
        x_bsw = x_bsw * share + x_bsw.detach() * (1 - share)
    if part.has("embed_drop"):
        return part.role("embed_drop")(x_bsw)
    return F.dropout(x_bsw, spec.dropout.embed, part.training) if spec.dropout.embed else x_bsw


class Stack(Part):
    """All blocks and the final norm."""

    def prepare(self, spec: ArchSpec, layer: int) -> None:
        """Store the spec."""
        del layer
        self.spec = spec

    def forward(self, x_bsw: Tensor, context: ForwardContext) -> Tensor:
        return run_layers(self, x_bsw, context)


def run_layers(part: Any, x_bsw: Tensor, context: ForwardContext) -> Tensor:
    """All layers and the final norm, on embedded tokens."""
    for layer, own in layer_contexts(part, x_bsw, context):
        x_bsw = own.after(layer(x_bsw, own))
    return finished(part, x_bsw, context)


def layer_contexts(
    part: Any, x: Tensor, context: ForwardContext
) -> list[tuple[Callable[..., Any], ForwardContext]]:
    """The layers to run on embedded tokens (b, s, w) in order, each with its context. With `context.keep` the last
    layer computes only the last `keep` tokens."""
    spec: ArchSpec = part.spec
    alibi, keep, context.keep = spec.position(Alibi), context.keep, None
    if alibi and context.scope.slopes_h is None:
        slopes = torch.tensor(alibi.slopes(spec.attention.heads), dtype=torch.float32)
        context.scope.slopes_h = slopes.to(x.device)
    if part.has("rel_bias"):
        context.scope.relative = _relative(part, spec, context.scope.index_k)
    rotary = spec.position(Rotary)
    if part.has("rotary") and context.cos is None:
        context.cos, context.sin = part.role("rotary")(x, context.positions_bs)
    elif rotary and context.cos is None:
        context.cos, context.sin = rotations(context.positions_bs, rotary, x.dtype)
    attention.prepare(context.scope, spec.windows, x.dtype)
    if context.hidden_states is not None:
        context.hidden_states.append(x)
    layers: list[Callable[..., Any]] = list(part.role("layers"))
    last = context if keep is None else replace(context, keep=min(keep, x.shape[1]))
    calls = [context] * (len(layers) - 1) + [last]
    if context.checkpointing is not None:
        every, how = context.checkpointing["every_n_layers"], context.checkpointing
        layers = [
            functools.partial(_checkpointed, layer, **how) if i % every == 0 else layer
            for i, layer in enumerate(layers)
        ]
    return list(zip(layers, calls, strict=True))


def finished(part: Any, x: Tensor, context: ForwardContext) -> Tensor:
    """The output of the last layer after the final norm."""
    if part.has("final_norm"):
        x = part.role("final_norm")(x)
    if context.hidden_states is not None:
        context.hidden_states[-1] = x
    return x


def _checkpointed(
    layer: Any, x: Tensor, context: ForwardContext, every_n_layers: int, offload: bool, **how: Any
) -> Any:
    """A block whose activations are recomputed from its input in the backward pass."""
    del every_n_layers
    with save_on_cpu() if offload else contextlib.nullcontext():
        return checkpoint(layer, x, context, **how)


def _relative(part: Any, spec: ArchSpec, index_k: Tensor) -> RelativeBias:
    """The bias of all distances between the keys."""
    buckets = spec.position(Buckets)
    assert buckets is not None
    table: nn.Module = part.role("rel_bias")
    keys = index_k.shape[0]
    distances = torch.arange(1 - keys, keys, device=index_k.device)
    return RelativeBias(table(relative_position_bucket(distances, buckets.count, buckets.max_distance)))
