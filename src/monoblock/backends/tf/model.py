"""One attention, one MLP, one block, for every family: they interpret an `ArchSpec`.

    x -> norm1 -> attention -> + -> norm2 -> MLP -> +      (placement "pre")
    x -> attention -> + -> norm1 -> MLP -> + -> norm2      (placement "post")

Each part looks its layers up by role at every call, so that whatever was replaced is honoured; the module tree (names,
classes, what holds what) is the family's table. Shape suffixes: b batch, s tokens, w width, h heads, g key/value heads,
d head width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from monoblock.backends.tf import attention
from monoblock.backends.tf.cache import CacheLayer
from monoblock.backends.tf.layers import EMBEDDED, OF_LAYER, PLACES, rows_of
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

Given = tuple[Tensor, Tensor | None, CacheLayer | None]  # a state, attention weights, a layer of the cache


@dataclass(frozen=True)
class ForwardContext:
    """What one forward pass gives to every block.

    Positions, of the tokens that come in and of all places, count tokens without padding; a first axis of 1 stands
    for all rows. `fresh`: no token came before. `max_length` is the cache's. `head_mask` (layers, 1, h, 1, 1) scales
    each head's weights. `seed` is the dropouts'; None: nothing drops. `checkpointing`: the backward pass computes the
    blocks again.
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
    """The hidden state after the last norm, and what was asked for besides."""

    hidden: Tensor
    layers: tuple[CacheLayer, ...] | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


def dropout(part: Part, role: str, x: Tensor, context: ForwardContext, shift: int = 0) -> Tensor:
    """With the dropout that plays a role, where there is one."""
    if context.seed is None or not part.has(role):
        return x
    return part.role(role)(x, seed=context.seed, shift=shift)


# ---------------------------------------------------------------------------- attention


class Attention(Part):
    """Self-attention with grouped heads, clipping, q/k norms, RoPE, ALiBi and windows."""

    def prepare(self, spec: ArchSpec, layer: int) -> None:
        """What this layer computes."""
        self.spec, self.index, self.window = spec.attention, layer, spec.windows[layer]
        self.rate = spec.dropout.attention
        att = spec.attention
        self.q_size, self.kv_size = att.heads * att.head_dim, att.kv_heads * att.head_dim
        self.by_head = att.qk_norm is not None and att.qk_norm.span == "head"
        # Dynamic scaling rotates all keys by angles that change with the length: such keys are cached before RoPE.
        rotary = spec.position(Rotary)
        self.late_rotary = rotary if is_dynamic(rotary) else None

    def call(self, x_bsw: Tensor, context: ForwardContext, layer: CacheLayer | None = None) -> Given:
        q, k, v = self.heads(*self.projected(x_bsw))
        if context.cos is not None and context.sin is not None:
            q = rotate(q, context.cos, context.sin)
            k = k if self.late_rotary else rotate(k, context.cos, context.sin)
        k, v, scope, layer = self.remembered(k, v, context, layer)
        if self.late_rotary:
            k = self.rotated(k, context, scope)
        scope = replace(scope, window=self.window)
        out, weights = self.attended(q, k, v, scope, context)
        if context.head_mask is not None:
            # A factor on a head's weights is one on its output.
            factor = tf.cast(context.head_mask[self.index], out.dtype)
            out = out * factor
            weights = None if weights is None else weights * factor
        out = tf.reshape(tf.transpose(out, (0, 2, 1, 3)), (size(x_bsw, 0), size(x_bsw, 1), self.q_size))
        return dropout(self, "out_drop", self.call_role("out", out), context), weights, layer

    def projected(self, x_bsw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (b, s, h * d), keys and values (b, s, g * d)."""
        if self.has("qkv_by_head"):  # each head's query, key and value lie together
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

    def attended(
        self, q: Tensor, k: Tensor, v: Tensor, scope: Scope, context: ForwardContext
    ) -> tuple[Tensor, Tensor | None]:
        """The attention's output (b, h, s, d), and its weights if they are asked for."""
        att, rate, seed = self.spec, self.rate, None
        if self.has("attn_drop"):
            rate = self.role("attn_drop").rate
        if context.seed is not None and rate:
            seed = tf.random.fold_in(context.seed, OF_LAYER * (self.index + 1) + PLACES["attn_drop"])
        kernel = attention.Kernel(att.scale, att.softcap, rate, seed, again=context.train)
        if context.attentions:
            return attention.attend_eager(q, k, v, scope, kernel)
        return attention.attend(q, k, v, scope, kernel), None

    def remembered(
        self, k: Tensor, v: Tensor, context: ForwardContext, layer: CacheLayer | None
    ) -> tuple[Tensor, Tensor, Scope, CacheLayer | None]:
        """The keys and values to attend to, the attention mask, and the layer of the cache with the new ones."""
        if layer is None or context.fresh:
            return k, v, context.scope, None if layer is None else layer.filled(k, v)
        after = layer.appended(k, v)
        if layer.grows or k.shape[2] == 1 or layer.slots == context.max_length:
            places = after.token_indices(layer.length + size(k, 2))
            keys, values = tf.cast(after.keys, k.dtype), tf.cast(after.values, v.dtype)
            return keys, values, context.scope.of_keys(places), after
        # A window that rolls: the new tokens would push out what the first of them still see.
        places = tf.concat((layer.token_indices(layer.length), context.scope.index_q), axis=0)
        k, v = (
            tf.concat((tf.cast(held, new.dtype), new), axis=2)
            for held, new in ((layer.keys, k), (layer.values, v))
        )
        return k, v, context.scope.of_keys(places), after

    def rotated(self, k: Tensor, context: ForwardContext, scope: Scope) -> Tensor:
        """All cached keys rotated by the angles of today's length."""
        assert self.late_rotary is not None
        length_b = tf.gather(context.key_positions_bk, scope.index_q[-1], axis=1) + 1
        positions = tf.gather(context.key_positions_bk, tf.maximum(scope.index_k, 0), axis=1)
        cos, sin = rotations(positions, self.late_rotary, k.dtype, length_b)
        return rotate(k, cos, sin)


class Wrapper(Part):
    """Calls the attention that it holds."""

    def call(self, x_bsw: Tensor, context: ForwardContext, layer: CacheLayer | None = None) -> Given:
        return self.call_role("attention", x_bsw, context=context, layer=layer)


class AttentionNorm(Part):
    """`norm(x + dropout(attention(x)))`."""

    def call(self, x: Tensor, context: ForwardContext, layer: CacheLayer | None = None) -> Given:
        y, weights, layer = self.call_role("attention", x, context=context, layer=layer)
        return self.call_role("norm1", dropout(self, "out_drop", y, context) + x), weights, layer


# ---------------------------------------------------------------------------- MLP


class Mlp(Part):
    """`down(act(up(x)))`, or gated: `down(act(gate(x)) * up(x))`; with dropout and added, where a residual is given."""

    def prepare(self, spec: ArchSpec, layer: int) -> None:
        """What this layer computes."""
        self.gated, self.rate = spec.mlp.gated, spec.dropout.residual
        self.place = OF_LAYER * (layer + 1) + PLACES["mlp_drop"]

    def call(self, x_bsw: Tensor, context: ForwardContext, residual_bsw: Tensor | None = None) -> Tensor:
        act, up = self.role("act"), self.call_role("up", x_bsw)
        y = self.call_role("down", act(self.call_role("gate", x_bsw)) * up if self.gated else act(up))
        if residual_bsw is not None:
            return dropped(y, self.rate, context.seed, self.place) + residual_bsw
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
    """Attention and MLP, each with its residual; the norm before the sub-layer or after the sum."""

    def prepare(self, spec: ArchSpec, layer: int) -> None:
        """Which of the three orders this block has."""
        del layer
        self.order = "nested" if self.has("attention_norm") else spec.placement
        self.attention_role = next(
            role for role in ("attention", "wrapper", "attention_norm") if self.has(role)
        )
        self.adds = self.has("mlp_add")

    def call(self, x: Tensor, context: ForwardContext, layer: CacheLayer | None = None) -> Given:
        attend = functools.partial(self.call_role, self.attention_role)
        if self.order == "pre":  # norms before the sub-layers
            y, weights, layer = attend(self.call_role("norm1", x), context=context, layer=layer)
            if self.adds:
                x = x + dropout(self, "layer_drop", y, context)
                x = self.call_role("mlp_add", self.call_role("norm2", x), context=context, residual_bsw=x)
            else:
                x = x + y
                y = self.call_role("mlp", self.call_role("norm2", x), context=context)
                x = x + dropout(self, "layer_drop", y, context, shift=1)
        elif self.order == "post":  # norms after the sums
            y, weights, layer = attend(x, context=context, layer=layer)
            x = self.call_role("norm1", x + y)
            x = self.call_role("norm2", x + self.call_role("mlp", x, context=context))
        else:  # sub-layers that add and norm by themselves
            x, weights, layer = attend(x, context=context, layer=layer)
            x = self.call_role("narrow", self.call_role("widen", x), context=context, residual=x)
        return x, weights, layer


# ---------------------------------------------------------------------------- model


class Embeddings(Part):
    """Embedded tokens (b, s, w) with positions, norm and dropout."""

    def prepare(self, spec: ArchSpec, layer: int) -> None:
        """What the embedding computes."""
        del layer
        self.spec = spec

    @property
    def weight(self) -> Any:
        """The table of the tokens' vectors."""
        return self.role("embed").embeddings

    def call(self, x_bsw: Tensor, context: ForwardContext) -> Tensor:
        return positioned(self, x_bsw, context)


def positioned(part: Any, x: Tensor, context: ForwardContext) -> Tensor:
    """Embedded tokens with their positions, norm and dropout; a share of the gradient if the spec says so."""
    spec: ArchSpec = part.spec
    if part.has("pos_embed"):
        learned, rows = spec.position(Learned), part.role("pos_embed")(context.positions_bs)
        if learned is not None and learned.pad_id is not None:
            rows = untrained(rows, context.positions_bs == learned.offset - 1)
        x = x + rows
    if part.has("embed_norm"):
        x = part.call_role("embed_norm", x)
    if (share := spec.embed_gradient) != 1.0:
        x = x * share + tf.stop_gradient(x) * (1 - share)
    if part.has("embed_drop"):
        return dropout(part, "embed_drop", x, context)
    return dropped(x, spec.dropout.embed, context.seed, EMBEDDED)


def looked_up(table: Any, input_ids: Tensor, spec: ArchSpec) -> Tensor:
    """Token ids (b, s) as vectors (b, s, w)."""
    x, learned = table(input_ids), spec.position(Learned)
    if learned is None or learned.pad_id is None:
        return x
    return untrained(x, input_ids == learned.pad_id)


def untrained(x_bsw: Tensor, padding_bs: Tensor) -> Tensor:
    """Rows of a table, to which no gradient comes from padding that is told by its id."""
    return tf.where(padding_bs[..., None], tf.stop_gradient(x_bsw), x_bsw)


def with_patches(project: Any, x_bsw: Tensor, patches: Tensor, rows_bs: Tensor) -> Tensor:
    """The tokens with projected image patches (P, size) in their places: `rows_bs` says which of them each token is, -1
    for none."""
    vectors = tf.cast(project(patches), x_bsw.dtype)
    taken = tf.gather(vectors, tf.maximum(rows_bs, 0))
    return tf.where((rows_bs >= 0)[..., None], taken, x_bsw)


class Stack(Part):
    """All blocks and the final norm."""

    def prepare(self, spec: ArchSpec, layer: int) -> None:
        """What the layers share."""
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
    context = prepared(part, x, context, cached=layers is not None)
    blocks = part.role("layers")
    states, weights, after = [x], [], []
    for block, layer in zip(blocks, layers or (None,) * len(blocks), strict=True):
        if context.checkpointing and context.train and layer is None and not context.attentions:
            x = again(block, x, context)
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


def prepared(part: Any, x: Tensor, context: ForwardContext, cached: bool) -> ForwardContext:
    """The call with what all layers share: ALiBi's slopes, the buckets' biases, RoPE's angles."""
    spec, scope = part.spec, context.scope
    if alibi := spec.position(Alibi):
        scope = replace(scope, slopes_h=tf.constant(alibi.slopes(spec.attention.heads), tf.float32))
    if buckets := spec.position(Buckets):
        table = rows_of(part.role("rel_bias"))
        scope = replace(scope, table=table, buckets=buckets)
        if not cached and attention.in_one_block(x.shape[1], scope.causal):  # once for all layers
            scope = replace(scope, table=biases(table, buckets_of(x.shape[1], buckets)), buckets=None)
    if rotary := spec.position(Rotary):
        cos, sin = rotations(context.positions_bs, rotary, x.dtype)
        context = replace(context, cos=cos, sin=sin)
    return replace(context, scope=scope)


def again(block: Any, x: Tensor, context: ForwardContext) -> Tensor:
    """A block of which only the input is kept: the backward pass computes it anew. Tables that every block shares are
    arguments, since a gradient reaches nothing else."""

    def run(x: Tensor, *table: Tensor) -> Tensor:
        scope = replace(context.scope, table=table[0]) if table else context.scope
        return block(x, context=replace(context, scope=scope))[0]

    arguments = (x,) if context.scope.table is None else (x, context.scope.table)
    return tf.recompute_grad(run)(*arguments)
