"""One attention, one MLP, one block, one backbone, for every family: they interpret an `ArchSpec`.

    x -> norm1 -> attention -> + -> norm2 -> MLP -> +      (placement "pre")
    x -> attention -> + -> norm1 -> MLP -> + -> norm2      (placement "post")

Shape suffixes: b batch, s tokens, w width, h heads, g key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from monoblock.backends.pytorch.cache import Cache
from monoblock.backends.pytorch.kernels import attention, dispatch, native_ops
from monoblock.backends.pytorch.kernels.linear import Linear
from monoblock.backends.pytorch.ops import ACT, Scope, bucketed, rotate, rotations
from monoblock.positions import is_dynamic
from monoblock.spec import ACTIVATIONS, Alibi, ArchSpec, Buckets, Learned, Norm, Rotary


@dataclass
class Call:
    """What one forward pass gives to every block.

    Positions, of the tokens that come in and of all keys, count tokens without padding; a first axis of 1 stands
    for all rows. `head_mask` (layers, 1, h, 1, 1) scales each head's weights. What does not come (the rotary `cos`
    and `sin`, ALiBi's slopes of the scope) is made from the spec. `one_token` takes the place of all between the
    projections of an attention: positions, cache and kernel.
    """

    scope: Scope
    positions_bs: Tensor
    key_positions_bk: Tensor
    cache: Cache | None = None
    attentions: bool = False
    head_mask: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    keep: int | None = None
    one_token: Callable[[Attention, Tensor, Tensor, Tensor], Tensor] | None = None


@dataclass
class BackboneOutput:
    """The hidden state after the last norm, and what was asked for besides."""

    hidden: Tensor
    cache: Cache | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class RMSNorm(nn.RMSNorm):
    """PyTorch's module; the native kernel where that can be used on a prompt."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        if x.shape[-2] > 1 and native_ops.usable(x, self.weight):
            return native_ops.norm(x, self.weight, None, self.eps, rms=True)
        if dispatch.traced():  # the older ONNX exporter knows no RMS norm
            return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight
        return super().forward(x)


class LayerNorm(nn.LayerNorm):
    """PyTorch's module; the native kernel where that can be used on a prompt."""

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-2] > 1 and native_ops.usable(input, self.weight, self.bias):
            return native_ops.norm(input, self.weight, self.bias, self.eps, rms=False)
        return super().forward(input)


def make_norm(norm: Norm, width: int) -> nn.Module:
    """The norm as a module."""
    if norm.kind == "rms":
        return RMSNorm(width, eps=norm.eps)
    return LayerNorm(width, eps=norm.eps, bias=norm.bias)


class Attention(nn.Module):
    """Self-attention over fused `[q|k|v]`, with grouped heads, clipping, q/k norms, RoPE, ALiBi and windows."""

    def __init__(self, spec: ArchSpec, layer: int) -> None:
        super().__init__()
        self.spec, self.layer, self.window = spec.attention, layer, spec.windows[layer]
        att = spec.attention
        self.sizes = [att.heads * att.head_dim, att.kv_heads * att.head_dim, att.kv_heads * att.head_dim]
        self.qkv = Linear(spec.width, sum(self.sizes), bias=att.qkv_bias)
        self.out = Linear(self.sizes[0], spec.width, bias=att.out_bias)
        self.by_head = att.qk_norm is not None and att.qk_norm.span == "head"
        if att.qk_norm is not None:
            q, k = (att.head_dim, att.head_dim) if self.by_head else self.sizes[:2]
            self.q_norm, self.k_norm = make_norm(att.qk_norm.norm, q), make_norm(att.qk_norm.norm, k)
        rotary = spec.position(Rotary)
        # Dynamic scaling turns all keys by angles that change with the length: such keys are cached unturned.
        self.late_rotary = rotary if is_dynamic(rotary) else None
        self.kernel = attention.Kernel(scale=att.scale, softcap=att.softcap, dropout=spec.dropout.attention)
        self.kernel_at_rest = replace(self.kernel, dropout=0.0)
        self.implementation = "sdpa"

    def forward(self, x_bsw: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.heads(self.qkv(x_bsw))
        if call.one_token is not None:
            return self.out(call.one_token(self, q, k, v)), None
        if call.cos is not None and call.sin is not None:
            q = rotate(q, call.cos, call.sin)
            k = k if self.late_rotary else rotate(k, call.cos, call.sin)
        if call.cache is not None:
            k, v = call.cache.update(k, v, self.layer)
        if self.late_rotary:
            k = self.turned(k, call)
        scope = call.scope if self.window is None else call.scope.narrowed(self.window, k.shape[2])
        if call.keep is not None:
            q, scope = q[:, :, -call.keep :], scope.last(call.keep)
        kernel = self.kernel if self.training else self.kernel_at_rest
        if call.attentions:
            out, weights = attention.attend_eager(q, k, v, scope, kernel)
        else:
            out, weights = attention.IMPLEMENTATIONS[self.implementation](q, k, v, scope, kernel), None
        if call.head_mask is not None:
            # A factor on a head's weights is one on its output.
            out = out * call.head_mask[self.layer]
            weights = None if weights is None else weights * call.head_mask[self.layer]
        return self.out(out.transpose(1, 2).flatten(2)), weights

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (b, h, s, d), keys and values (b, g, s, d), clipped and normed."""
        if self.spec.clip is not None:
            qkv = qkv.clamp(-self.spec.clip, self.spec.clip)
        q, k, v = qkv.split(self.sizes, dim=-1)
        if self.spec.qk_norm is not None and not self.by_head:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2) for x in (q, k, v))
        if self.by_head:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def turned(self, k: Tensor, call: Call) -> Tensor:
        """All cached keys turned by the angles of today's length."""
        assert self.late_rotary is not None
        cos, sin = rotations(call.key_positions_bk[:, -k.shape[2] :], self.late_rotary, k.dtype)
        return rotate(k, cos, sin)


class Mlp(nn.Module):
    """`down(act(up(x)))`, or gated; gate and up are one fused `[gate|up]` matrix."""

    def __init__(self, spec: ArchSpec) -> None:
        super().__init__()
        mlp = spec.mlp
        if mlp.gated:
            self.gate_up = Linear(spec.width, 2 * mlp.width, bias=mlp.bias)
        else:
            self.up = Linear(spec.width, mlp.width, bias=mlp.bias)
        self.down = Linear(mlp.width, spec.width, bias=mlp.bias)
        self.act, self.gated, self.kind = ACT[mlp.act], mlp.gated, ACTIVATIONS.index(mlp.act)

    def forward(self, x_bsw: Tensor) -> Tensor:
        return self.down(self.activated((self.gate_up if self.gated else self.up)(x_bsw)))

    def activated(self, x_bsw: Tensor) -> Tensor:
        """What `down` takes, of what the first matrix gives."""
        if x_bsw.shape[-2] > 1 and x_bsw.numel() and native_ops.usable(x_bsw):
            return native_ops.activate(x_bsw, self.kind, self.gated)
        if self.gated:
            gate, up = x_bsw.chunk(2, dim=-1)
            return self.act(gate) * up
        return self.act(x_bsw)


class Block(nn.Module):
    """Attention and MLP, each with its residual; the norm before the sub-layer or after the sum."""

    def __init__(self, spec: ArchSpec, layer: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = make_norm(spec.norm, spec.width), make_norm(spec.norm, spec.width)
        self.attn, self.mlp = Attention(spec, layer), Mlp(spec)
        self.dropout = nn.Dropout(spec.dropout.residual)
        self.pre = spec.placement == "pre"

    def forward(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
        y, weights = self.attn(self.norm1(x) if self.pre else x, call)
        x = (x if call.keep is None else x[:, -call.keep :]) + self.dropout(y)
        if self.pre:
            return x + self.dropout(self.mlp(self.norm2(x))), weights
        x = self.norm1(x)
        return self.norm2(x + self.dropout(self.mlp(x))), weights


class Backbone(nn.Module):
    """Embeddings, blocks, final norm."""

    def __init__(self, spec: ArchSpec) -> None:
        super().__init__()
        self.spec = spec
        self.learned, self.rotary, self.alibi = (
            spec.position(Learned),
            spec.position(Rotary),
            spec.position(Alibi),
        )
        # Padding that is told by its id is not trained, nor is its position.
        pad = self.learned.pad_id if self.learned else None
        self.embed = nn.Embedding(spec.vocab, spec.width, padding_idx=pad)
        if self.learned:
            before = None if pad is None else self.learned.offset - 1
            self.pos_embed = nn.Embedding(self.learned.size, spec.width, padding_idx=before)
        self.buckets = spec.position(Buckets)
        if self.buckets:
            self.rel_bias = nn.Embedding(self.buckets.count, spec.attention.heads)
        if spec.patches:
            self.patch_embed = Linear(spec.patches.size, spec.width)
        self.embed_norm = make_norm(spec.embed_norm, spec.width) if spec.embed_norm else nn.Identity()
        self.dropout = nn.Dropout(spec.dropout.embed)
        self.blocks = nn.ModuleList(Block(spec, i) for i in range(spec.layers))
        self.final_norm = make_norm(spec.final_norm, spec.width) if spec.final_norm else nn.Identity()
        self.gradient_checkpointing = False

    def forward(
        self,
        x_bsw: Tensor,
        call: Call,
        *,
        hidden_states: bool = False,
        keep: int | None = None,
    ) -> BackboneOutput:
        """Run the blocks on embedded tokens (b, s, w). `keep`: the result is of so many last tokens, and the last
        block computes no others."""
        x = self.embedded(x_bsw, call)
        if self.alibi and call.scope.slopes_h is None:
            slopes = torch.tensor(self.alibi.slopes(self.spec.attention.heads), dtype=torch.float32)
            call.scope.slopes_h = slopes.to(x.device)
        if self.buckets:
            call.scope.relative = self.relative
        if self.rotary and call.cos is None:
            call.cos, call.sin = rotations(call.positions_bs, self.rotary, x.dtype)
        attention.prepare(call.scope, self.spec.windows, x.dtype)
        states, weights = [x], []
        for block in self.blocks:
            if keep is not None and block is self.blocks[-1]:
                call = replace(call, keep=min(keep, x.shape[1]))
            if self.gradient_checkpointing and self.training:
                x, weight = checkpoint(block, x, call, use_reentrant=False)  # pyright: ignore
            else:
                x, weight = block(x, call)
            if hidden_states:
                states.append(x)
            if call.attentions:
                weights.append(weight)
        x = states[-1] = self.final_norm(x)
        return BackboneOutput(
            hidden=x,
            cache=call.cache,
            hidden_states=tuple(states) if hidden_states else None,
            attentions=tuple(weights) if call.attentions else None,
        )

    def embedded(self, x: Tensor, call: Call) -> Tensor:
        """Tokens with their positions, norm and dropout; a share of the gradient if the spec says so."""
        if self.learned:
            x = x + self.pos_embed(call.positions_bs)
        x = self.embed_norm(x)
        if (share := self.spec.embed_gradient) != 1.0:
            x = x * share + x.detach() * (1 - share)
        return self.dropout(x)

    def with_patches(
        self, x_bsw: Tensor, input_ids: Tensor, patches: Tensor | list[Tensor], indices_bs: Tensor | None
    ) -> Tensor:
        """The tokens with projected image patches in the places that are theirs.

        `patches`: with `indices_bs`, (n, size) for each row, and which of its row's patches each token is, -1 for none.
        Without, all patches of the batch in order: the tokens of the patch id take one after the other.
        """
        layout = self.spec.patches
        if layout is None:
            raise ValueError("image patches were given, but the model takes text alone")
        one_set = isinstance(patches, Tensor) and patches.dim() == 2
        sets: list[Tensor] = [patches] if one_set else list(patches)  # pyright: ignore[reportAssignmentType]
        for own in sets:
            if own.shape[-1] != layout.size:
                raise ValueError(f"image patches must be (.., {layout.size}), got {tuple(own.shape)}")
        sets = [own.reshape(-1, layout.size).to(x_bsw.device) for own in sets]
        if indices_bs is None:
            places = (input_ids == layout.token_id).flatten()
            taken = torch.cat(sets)
            if len(taken) != (count := int(places.sum())):
                raise ValueError(
                    f"{len(taken)} image patches came for {count} tokens of the id {layout.token_id}: without "
                    "image_patches_indices there must be as many"
                )
        else:
            indices = indices_bs[:, -x_bsw.shape[1] :]
            _check_patches(sets, indices, x_bsw.shape[0])
            places = (indices >= 0).flatten()
            taken = torch.cat([own[i[i >= 0]] for own, i in zip(sets, indices, strict=True)])
        vectors = self.patch_embed(taken.to(self.patch_embed.weight.dtype)).to(x_bsw.dtype)
        return x_bsw.flatten(0, 1).index_copy(0, places.nonzero()[:, 0], vectors).view_as(x_bsw)

    def relative(self, distance_qk: Tensor) -> Tensor:
        """The bias (h, q, k) of distances (q, k) between keys and queries."""
        assert self.buckets is not None
        buckets = bucketed(distance_qk, self.buckets.count, self.buckets.max_distance)
        return F.embedding(buckets, self.rel_bias.weight).permute(2, 0, 1)

    def lookup(self, input_ids: Tensor) -> Tensor:
        """Token ids (b, s) as vectors (b, s, w)."""
        return self.embed(input_ids)


def _check_patches(sets: list[Tensor], indices_bs: Tensor, batch: int) -> None:
    if len(sets) != batch:
        raise ValueError(f"image_patches must hold one set for each of the {batch} rows, got {len(sets)}")
    for row, (own, indices) in enumerate(zip(sets, indices_bs, strict=True)):
        if (needed := int(indices.max()) + 1) > len(own):
            raise ValueError(f"row {row} has places for {needed} image patches, but {len(own)} came")
