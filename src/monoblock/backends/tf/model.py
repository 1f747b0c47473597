"""The attention, MLP and block of all families, configured by an `ArchSpec`.

    x -> norm1 -> attention -> + -> norm2 -> MLP -> +      (placement "pre")
    x -> attention -> + -> norm1 -> MLP -> + -> norm2      (placement "post")

Layers are looked up by role at every call, so that replaced layers take effect; the family's table defines the module
tree, its names and classes. Shape suffixes: b batch, s tokens, w width, h heads, g key/value heads,
d head width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from monoblock.backends.tf import attention
from monoblock.backends.tf.cache import CacheLayer
from monoblock.backends.tf.layers import DROPOUT_INDICES, EMBEDDED, OF_LAYER, rows_of
from monoblock.backends.tf.ops import (
    Tensor,
    biases,
    buckets_of,
    dropped,
    rotate,
    rotations,
    size,
)
from monoblock.backends.tf.parts import Part
from monoblock.backends.tf.parts import call as call_layer
from monoblock.backends.tf.scope import Scope
from monoblock.positions import is_dynamic
from monoblock.spec import Alibi, ArchSpec, Buckets, Learned, Rotary

LayerOutput = tuple[
    Tensor, Tensor | None, CacheLayer | None
]  # hidden states, attention weights, the layer's cache


@dataclass(frozen=True)
class ForwardContext:
    """Inputs of all blocks in one forward pass.

    Positions, of the new tokens and of all keys, count tokens without padding; a first axis of 1 stands for all rows.
    `fresh`: there are no past tokens. `max_length` is the cache's. `head_mask` (layers, 1, h, 1, 1) scales each head's
    attention weights. `seed`: that of dropout; None: no dropout. `checkpointing`: the backward pass recomputes blocks.
    """

    scope: Scope
    positions_bs: Tensor
    key_positions_bk: Tensor
    cos: Tensor | None = None
    sin: Tensor | None = None
    head_mask: Tensor | None = None
    seed: Tensor | None = None
    fresh: bool = True
    max_length: int | None = None
    attentions: bool = False
    train: bool = False
    checkpointing: bool = False


@dataclass(frozen=True)
class StackOutput:
    """The final hidden state (after the last norm), and the requested optional outputs."""

    hidden: Tensor
    layers: tuple[CacheLayer, ...] | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


def dropout(part: Part, role: str, x: Tensor, context: ForwardContext, shift: int = 0) -> Tensor:
    """Apply the dropout layer of a role, if there is one."""
    if context.seed is None or not part.has(role):
        return x
    return part.role(role)(x, seed=context.seed, shift=shift)


# ---------------------------------------------------------------------------- attention


class Attention(Part):
    """Self-attention with grouped heads, clipping, q/k norms, RoPE, ALiBi and windows."""

    def prepare(self, spec: ArchSpec, layer: int) -> None:
        """Read the layer's configuration."""
        self.spec, self.index, self.window = spec.attention, layer, spec.windows[layer]
        self.rate = spec.dropout.attention
        att = spec.attention
        self.q_size, self.kv_size = att.heads * att.head_dim, att.kv_heads * att.head_dim
        self.by_head = att.qk_norm is not None and att.qk_norm.span == "head"
        # With dynamic RoPE scaling, the angles of all keys depend on the length: keys are cached before RoPE.
        rotary = spec.position(Rotary)
        self.late_rotary = rotary if is_dynamic(rotary) else None

    def call(self, x_bsw: Tensor, context: ForwardContext, layer: CacheLayer | None = None) -> LayerOutput:
        q, k, v = self.heads(*self.project(x_bsw))
        if context.cos is not None and context.sin is not None:
            q = rotate(q, context.cos, context.sin)
            k = k if self.late_rotary else rotate(k, context.cos, context.sin)
        k, v, scope, layer = self.update_cache(k, v, context, layer)
        if self.late_rotary:
            k = self.rotate_cached_keys(k, context, scope)
        scope = replace(scope, window=self.window)
        out, weights = self.attend(q, k, v, scope, context)
        if context.head_mask is not None:
            # Scaling a head's weights scales its output.
            factor = tf.cast(context.head_mask[self.index], out.dtype)
            out = out * factor
            weights = None if weights is None else weights * factor
        out = tf.reshape(tf.transpose(out, (0, 2, 1, 3)), (size(x_bsw, 0), size(x_bsw, 1), self.q_size))
        return dropout(self, "out_drop", self.call_role("out", out), context), weights, layer

    def project(self, x_bsw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (b, s, h * d), keys and values (b, s, g * d)."""
        if self.has("qkv_by_head"):  # interleaved by head
            att, whole = self.spec, self.call_role("qkv_by_head", x_bsw)
            shape = (size(whole, 0), size(whole, 1), att.heads, 3, att.head_dim)
            q, k, v = tf.unstack(tf.reshape(whole, shape), axis=3)
            flat = (*shape[:2], self.q_size)
            return tf.reshape(q, flat), tf.reshape(k, flat), tf.reshape(v, flat)
        if self.has("qkv"):
            q, k, v = tf.split(
                self.call_role("qkv", x_bsw), (self.q_size, self.kv_size, self.kv_size), axis=-1
            )
            return q, k, v
        return self.call_role("q", x_bsw), self.call_role("k", x_bsw), self.call_role("v", x_bsw)

    def heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (b, h, s, d), keys and values (b, g, s, d), clipped and normed."""
        att = self.spec
        if att.clip is not None:
            q, k, v = (tf.clip_by_value(x, -att.clip, att.clip) for x in (q, k, v))
        if att.qk_norm is not None and not self.by_head:
            q, k = self.call_role("q_norm", q), self.call_role("k_norm", k)
        batch, count = size(q, 0), size(q, 1)
        q, k, v = (
            tf.transpose(tf.reshape(x, (batch, count, heads, att.head_dim)), (0, 2, 1, 3))
            for x, heads in ((q, att.heads), (k, att.kv_heads), (v, att.kv_heads))
        )
        if self.by_head:
            q, k = self.call_role("q_norm", q), self.call_role("k_norm", k)
        return q, k, v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scope: Scope, context: ForwardContext
    ) -> tuple[Tensor, Tensor | None]:
        """The attention output (b, h, s, d), and the attention weights if requested."""
        att, rate, seed = self.spec, self.rate, None
        if self.has("attn_drop"):
            rate = self.role("attn_drop").rate
        if context.seed is not None and rate:
            seed = tf.random.fold_in(context.seed, OF_LAYER * (self.index + 1) + DROPOUT_INDICES["attn_drop"])
        kernel = attention.Kernel(att.scale, att.softcap, rate, seed, recompute=context.train)
        if context.attentions:
            return attention.attend_eager(q, k, v, scope, kernel)
        return attention.attend(q, k, v, scope, kernel), None

    def update_cache(
        self, k: Tensor, v: Tensor, context: ForwardContext, layer: CacheLayer | None
    ) -> tuple[Tensor, Tensor, Scope, CacheLayer | None]:
        """The keys and values to attend to, their attention mask, and the updated cache."""
        if layer is None or context.fresh:
            return k, v, context.scope, None if layer is None else layer.filled(k, v)
        after = layer.appended(k, v)
        if layer.grows or k.shape[2] == 1 or layer.slots == context.max_length:
            index_k = after.token_indices(layer.length + size(k, 2))
            keys, values = tf.cast(after.keys, k.dtype), tf.cast(after.values, v.dtype)
            return keys, values, context.scope.of_keys(index_k), after
        # A ring buffer: the new tokens overwrite keys that the first of them still attend to.
        index_k = tf.concat((layer.token_indices(layer.length), context.scope.index_q), axis=0)
        k, v = (
            tf.concat((tf.cast(cached, new.dtype), new), axis=2)
            for cached, new in ((layer.keys, k), (layer.values, v))
        )
        return k, v, context.scope.of_keys(index_k), after

    def rotate_cached_keys(self, k: Tensor, context: ForwardContext, scope: Scope) -> Tensor:
        """All keys, rotated by the angles of the current length."""
        assert self.late_rotary is not None
        length_b = tf.gather(context.key_positions_bk, scope.index_q[-1], axis=1) + 1
        positions = tf.gather(context.key_positions_bk, tf.maximum(scope.index_k, 0), axis=1)
        cos, sin = rotations(positions, self.late_rotary, k.dtype, length_b)
        return rotate(k, cos, sin)


class Wrapper(Part):
    """A layer that only contains the attention."""

    def call(self, x_bsw: Tensor, context: ForwardContext, layer: CacheLayer | None = None) -> LayerOutput:
        return self.call_role("attention", x_bsw, context=context, layer=layer)


class AttentionNorm(Part):
    """`norm(x + dropout(attention(x)))`."""

    def call(self, x: Tensor, context: ForwardContext, layer: CacheLayer | None = None) -> LayerOutput:
        y, weights, layer = self.call_role("attention", x, context=context, layer=layer)
        return self.call_role("norm1", dropout(self, "out_drop", y, context) + x), weights, layer


# ---------------------------------------------------------------------------- MLP


class Mlp(Part):
    """`down(act(up(x)))`, or gated: `down(act(gate(x)) * up(x))`; with dropout and added to a given residual."""

    def prepare(self, spec: ArchSpec, layer: int) -> None:
        """Read the layer's configuration."""
        self.gated, self.rate = spec.mlp.gated, spec.dropout.residual
        self.dropout_index = OF_LAYER * (layer + 1) + DROPOUT_INDICES["mlp_drop"]

    def call(self, x_bsw: Tensor, context: ForwardContext, residual_bsw: Tensor | None = None) -> Tensor:
        act, up = self.role("act"), self.call_role("up", x_bsw)
        y = self.call_role("down", act(self.call_role("gate", x_bsw)) * up if self.gated else act(up))
        if residual_bsw is not None:
            return dropped(y, self.rate, context.seed, self.dropout_index) + residual_bsw
        return dropout(self, "mlp_drop", y, context)


class Widen(Part):
    """`act(up(x))`."""

    def call(self, x: Tensor) -> Tensor:
        return self.role("act")(self.call_role("up", x))


class Narrow(Part):
    """`norm(dropout(down(x)) + residual)`."""

    def call(self, x: Tensor, context: ForwardContext, residual: Tensor) -> Tensor:
        return self.call_role(
            "norm2", dropout(self, "mlp_drop", self.call_role("down", x), context) + residual
        )


# ---------------------------------------------------------------------------- block


class Block(Part):
    """Attention and MLP, each with a residual connection, pre-norm or post-norm."""

    def prepare(self, spec: ArchSpec, layer: int) -> None:
        """Determine the order of sub-layers, norms and residuals."""
        del layer
        self.order = "nested" if self.has("attention_norm") else spec.placement
        self.attention_role = next(
            role for role in ("attention", "wrapper", "attention_norm") if self.has(role)
        )
        self.adds = self.has("mlp_add")

    def call(self, x: Tensor, context: ForwardContext, layer: CacheLayer | None = None) -> LayerOutput:
        attend = functools.partial(self.call_role, self.attention_role)
        if self.order == "pre":  # pre-norm
            y, weights, layer = attend(self.call_role("norm1", x), context=context, layer=layer)
            if self.adds:
                x = x + dropout(self, "layer_drop", y, context)
                x = self.call_role("mlp_add", self.call_role("norm2", x), context=context, residual_bsw=x)
            else:
                x = x + y
                y = self.call_role("mlp", self.call_role("norm2", x), context=context)
                x = x + dropout(self, "layer_drop", y, context, shift=1)
        elif self.order == "post":  # post-norm
            y, weights, layer = attend(x, context=context, layer=layer)
            x = self.call_role("norm1", x + y)
            x = self.call_role("norm2", x + self.call_role("mlp", x, context=context))
        else:  # sub-layers include the residual and the norm
            x, weights, layer = attend(x, context=context, layer=layer)
            x = self.call_role("narrow", self.call_role("widen", x), context=context, residual=x)
        return x, weights, layer


# ---------------------------------------------------------------------------- model


class Embeddings(Part):
    """Adds position embeddings, norm and dropout to embedded tokens (b, s, w)."""

    def prepare(self, spec: ArchSpec, layer: int) -> None:
        """Store the spec."""
        del layer
        self.spec = spec

    @property
    def weight(self) -> Any:
        """The token embedding matrix."""
        return self.role("embed").embeddings

    def call(self, x_bsw: Tensor, context: ForwardContext) -> Tensor:
        return positioned(self, x_bsw, context)


def positioned(part: Any, x: Tensor, context: ForwardContext) -> Tensor:
    """Add position embeddings, norm and dropout; `spec.embed_gradient` scales the gradient."""
    spec: ArchSpec = part.spec
    if part.has("pos_embed"):
        learned, rows = spec.position(Learned), part.role("pos_embed")(context.positions_bs)
        if learned is not None and learned.pad_id is not None:
            rows = stop_padding_gradient(rows, context.positions_bs == learned.offset - 1)
        x = x + rows
    if part.has("embed_norm"):
        x = part.call_role("embed_norm", x)
    if (share := spec.embed_gradient) != 1.0:
        x = x * share + tf.stop_gradient(x) * (1 - share)
    if part.has("embed_drop"):
        return dropout(part, "embed_drop", x, context)
    return dropped(x, spec.dropout.embed, context.seed, EMBEDDED)


def embed_tokens(table: Any, input_ids: Tensor, spec: ArchSpec) -> Tensor:
    """The embeddings (b, s, w) of token ids (b, s)."""
    x, learned = table(input_ids), spec.position(Learned)
    if learned is None or learned.pad_id is None:
        return x
    return stop_padding_gradient(x, input_ids == learned.pad_id)


def stop_padding_gradient(x_bsw: Tensor, padding_bs: Tensor) -> Tensor:
    """Embeddings without a gradient at padding, as with PyTorch's `padding_idx`."""
    return tf.where(padding_bs[..., None], tf.stop_gradient(x_bsw), x_bsw)


def with_patches(project: Any, x_bsw: Tensor, patches: Tensor, rows_bs: Tensor) -> Tensor:
    """Replace tokens by projected image patches (P, size); `rows_bs`: the index of each token's patch, -1 for text."""
    vectors = tf.cast(project(patches), x_bsw.dtype)
    taken = tf.gather(vectors, tf.maximum(rows_bs, 0))
    return tf.where((rows_bs >= 0)[..., None], taken, x_bsw)


class Stack(Part):
    """All blocks and the final norm."""

    def prepare(self, spec: ArchSpec, layer: int) -> None:
        """Store the spec."""
        del layer
        self.spec = spec

    def call(
        self,
        x_bsw: Tensor,
        context: ForwardContext,
        layers: tuple[CacheLayer, ...] | None = None,
        hidden_states: bool = False,
    ) -> StackOutput:
        return run_layers(self, x_bsw, context, layers, hidden_states)


def run_layers(
    part: Any, x: Tensor, context: ForwardContext, layers: tuple[CacheLayer, ...] | None, hidden_states: bool
) -> StackOutput:
    """All layers and the final norm, on embedded tokens (b, s, w)."""
    context = with_shared_inputs(part, x, context, cached=layers is not None)
    blocks = part.role("layers")
    states, weights, after = [x], [], []
    for block, layer in zip(blocks, layers or (None,) * len(blocks), strict=True):
        if context.checkpointing and context.train and layer is None and not context.attentions:
            x = checkpointed(block, x, context)
        else:
            x, weight, layer = call_layer(block, x, context=context, layer=layer)
            weights.append(weight)
            after.append(layer)
        states.append(x)
    hidden = states[-1] = part.call_role("final_norm", x) if part.has("final_norm") else x
    return StackOutput(
        hidden=hidden,
        layers=tuple(after) if layers else None,
        hidden_states=tuple(states) if hidden_states else None,
        attentions=tuple(weights) if context.attentions else None,
    )


def with_shared_inputs(part: Any, x: Tensor, context: ForwardContext, cached: bool) -> ForwardContext:
    """Add inputs that all layers share: ALiBi slopes, relative position biases, RoPE's cos and sin."""
    spec, scope = part.spec, context.scope
    if alibi := spec.position(Alibi):
        scope = replace(scope, slopes_h=tf.constant(alibi.slopes(spec.attention.heads), tf.float32))
    if buckets := spec.position(Buckets):
        table = rows_of(part.role("rel_bias"))
        scope = replace(scope, table=table, buckets=buckets)
        if not cached and attention.in_one_block(x.shape[1], scope.causal):  # computed once for all layers
            scope = replace(scope, table=biases(table, buckets_of(x.shape[1], buckets)), buckets=None)
    if rotary := spec.position(Rotary):
        cos, sin = rotations(context.positions_bs, rotary, x.dtype)
        context = replace(context, cos=cos, sin=sin)
    return replace(context, scope=scope)


def checkpointed(block: Any, x: Tensor, context: ForwardContext) -> Tensor:
    """A block with gradient checkpointing: only its input is stored. The shared bias table is an argument, as
    `recompute_grad` has gradients for arguments only."""

    def run(x: Tensor, *table: Tensor) -> Tensor:
        scope = replace(context.scope, table=table[0]) if table else context.scope
        return block(x, context=replace(context, scope=scope))[0]

    arguments = (x,) if context.scope.table is None else (x, context.scope.table)
    return tf.recompute_grad(run)(*arguments)
