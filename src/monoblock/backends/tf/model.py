"""One attention, one MLP, one block, one backbone, for every family: they interpret an `ArchSpec`.

    x -> norm1 -> attention -> + -> norm2 -> MLP -> +      (placement "pre")
    x -> attention -> + -> norm1 -> MLP -> + -> norm2      (placement "post")

The parts are Keras's own, so the weights have Keras's names: `kernel` (inputs, outputs), `gamma` and `beta`,
`embeddings`, `bias`. Shape suffixes: b batch, s tokens, w width, h heads, g key/value heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from monoblock.backends.tf import attention
from monoblock.backends.tf.cache import Layer
from monoblock.backends.tf.layers import NormLayer, Part, make_linear, make_table, rows_of
from monoblock.backends.tf.ops import (
    ACT,
    Tensor,
    biases,
    buckets_of,
    dropped,
    rotate,
    rotations,
    size,
)
from monoblock.backends.tf.scope import Scope
from monoblock.positions import is_dynamic
from monoblock.spec import Alibi, ArchSpec, Buckets, Learned, Rotary

# Places of dropout, which numbers tell apart: that of the embedding, and those of each block.
EMBEDDED, OF_BLOCK, HEAD = 0, 4, -4


@dataclass(frozen=True)
class Call:
    """What one forward pass gives to every block.

    Positions, of the tokens that come in and of all places, count tokens without padding; a first axis of 1 stands
    for all rows. `fresh`: no token came before. `max_length` is the cache's. `head_mask` (layers, 1, h, 1, 1) scales
    each head's weights. `seed` is the dropouts'; None: nothing drops.
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


@dataclass(frozen=True)
class BackboneOutput:
    """The hidden state after the last norm, and what was asked for besides."""

    hidden: Tensor
    layers: tuple[Layer, ...] | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class Attention(Part):
    """Self-attention over fused `[q|k|v]`, with grouped heads, clipping, q/k norms, RoPE, ALiBi and windows."""

    def __init__(self, spec: ArchSpec, index: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spec, self.index, self.window = spec, index, spec.windows[index]
        att, policy = spec.attention, self.dtype_policy
        self.q_size, self.kv_size = att.heads * att.head_dim, att.kv_heads * att.head_dim
        self.qkv = make_linear(spec, self.q_size + 2 * self.kv_size, att.qkv_bias, "qkv", policy)
        self.out = make_linear(spec, spec.width, att.out_bias, "out", policy)
        self.by_head = att.qk_norm is not None and att.qk_norm.span == "head"
        if att.qk_norm is not None:
            self.q_norm = NormLayer(att.qk_norm.norm, name="q_norm", dtype=policy)
            self.k_norm = NormLayer(att.qk_norm.norm, name="k_norm", dtype=policy)
        # Dynamic scaling turns all keys by angles that change with the length: such keys are cached unturned.
        rotary = spec.position(Rotary)
        self.late_rotary = rotary if is_dynamic(rotary) else None

    def make(self) -> None:
        self.qkv.build((None, None, self.spec.width))
        self.out.build((None, None, self.q_size))
        if self.spec.attention.qk_norm is not None:
            head_dim = self.spec.attention.head_dim
            self.q_norm.build((None, head_dim if self.by_head else self.q_size))
            self.k_norm.build((None, head_dim if self.by_head else self.kv_size))

    def call(
        self, x_bsw: Tensor, call: Call, layer: Layer | None = None
    ) -> tuple[Tensor, Tensor | None, Layer | None]:
        q, k, v = self.heads(self.qkv(x_bsw))
        if call.cos is not None and call.sin is not None:
            q = rotate(q, call.cos, call.sin)
            k = k if self.late_rotary else rotate(k, call.cos, call.sin)
        k, v, scope, layer = self.remembered(k, v, call, layer)
        if self.late_rotary:
            k = self.turned(k, call, scope)
        scope = replace(scope, window=self.window)
        out, weights = self.attended(q, k, v, scope, call)
        if call.head_mask is not None:
            # A factor on a head's weights is one on its output.
            factor = tf.cast(call.head_mask[self.index], out.dtype)
            out = out * factor
            weights = None if weights is None else weights * factor
        out = tf.reshape(tf.transpose(out, (0, 2, 1, 3)), (size(x_bsw, 0), size(x_bsw, 1), self.q_size))
        return self.out(out), weights, layer

    def attended(
        self, q: Tensor, k: Tensor, v: Tensor, scope: Scope, call: Call
    ) -> tuple[Tensor, Tensor | None]:
        """The attention's output (b, h, s, d), and its weights if they are asked for."""
        att, rate, seed = self.spec.attention, self.spec.dropout.attention, None
        if call.seed is not None and rate:
            seed = tf.random.fold_in(call.seed, OF_BLOCK * (self.index + 1) + 2)
        kernel = attention.Kernel(att.scale, att.softcap, rate, seed, again=call.train)
        if call.attentions:
            return attention.attend_eager(q, k, v, scope, kernel)
        return attention.attend(q, k, v, scope, kernel), None

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (b, h, s, d), keys and values (b, g, s, d), clipped and normed."""
        att = self.spec.attention
        if att.clip is not None:
            qkv = tf.clip_by_value(qkv, -att.clip, att.clip)
        q, k, v = tf.split(qkv, (self.q_size, self.kv_size, self.kv_size), axis=-1)
        if att.qk_norm is not None and not self.by_head:
            q, k = self.q_norm(q), self.k_norm(k)
        batch, count = size(qkv, 0), size(qkv, 1)
        q, k, v = (
            tf.transpose(
                tf.reshape(x, (batch, count, (x.shape[-1] or 0) // att.head_dim, att.head_dim)), (0, 2, 1, 3)
            )
            for x in (q, k, v)
        )
        if self.by_head:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def remembered(
        self, k: Tensor, v: Tensor, call: Call, layer: Layer | None
    ) -> tuple[Tensor, Tensor, Scope, Layer | None]:
        """The keys and values that these queries see, who sees whom, and the layer of the cache with the new ones."""
        if layer is None or call.fresh:
            return k, v, call.scope, None if layer is None else layer.filled(k, v)
        after = layer.appended(k, v)
        if layer.grows or k.shape[2] == 1 or layer.slots == call.max_length:
            places = after.places(layer.length + size(k, 2))
            keys, values = tf.cast(after.keys, k.dtype), tf.cast(after.values, v.dtype)
            return keys, values, call.scope.of_keys(places), after
        # A window that rolls: the new tokens would push out what the first of them still see.
        places = tf.concat((layer.places(layer.length), call.scope.index_q), axis=0)
        k, v = (
            tf.concat((tf.cast(held, new.dtype), new), axis=2)
            for held, new in ((layer.keys, k), (layer.values, v))
        )
        return k, v, call.scope.of_keys(places), after

    def turned(self, k: Tensor, call: Call, scope: Scope) -> Tensor:
        """All cached keys turned by the angles of today's length."""
        assert self.late_rotary is not None
        length_b = tf.gather(call.key_positions_bk, scope.index_q[-1], axis=1) + 1
        positions = tf.gather(call.key_positions_bk, tf.maximum(scope.index_k, 0), axis=1)
        cos, sin = rotations(positions, self.late_rotary, k.dtype, length_b)
        return rotate(k, cos, sin)


class Mlp(Part):
    """`down(act(up(x)))`, or gated; gate and up are one fused `[gate|up]` matrix."""

    def __init__(self, spec: ArchSpec, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spec, mlp, policy = spec, spec.mlp, self.dtype_policy
        if mlp.gated:
            self.gate_up = make_linear(spec, 2 * mlp.width, mlp.bias, "gate_up", policy)
        else:
            self.up = make_linear(spec, mlp.width, mlp.bias, "up", policy)
        self.down = make_linear(spec, spec.width, mlp.bias, "down", policy)

    def make(self) -> None:
        (self.gate_up if self.spec.mlp.gated else self.up).build((None, None, self.spec.width))
        self.down.build((None, None, self.spec.mlp.width))

    def call(self, x_bsw: Tensor) -> Tensor:
        act = ACT[self.spec.mlp.act]
        if self.spec.mlp.gated:
            gate, up = tf.split(self.gate_up(x_bsw), 2, axis=-1)
            return self.down(act(gate) * up)
        return self.down(act(self.up(x_bsw)))


class Block(Part):
    """Attention and MLP, each with its residual; the norm before the sub-layer or after the sum."""

    def __init__(self, spec: ArchSpec, index: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spec, self.index, policy = spec, index, self.dtype_policy
        self.norm1 = NormLayer(spec.norm, name="norm1", dtype=policy)
        self.attn = Attention(spec, index, name="attn", dtype=policy)
        self.norm2 = NormLayer(spec.norm, name="norm2", dtype=policy)
        self.mlp = Mlp(spec, name="mlp", dtype=policy)

    def make(self) -> None:
        self.norm1.build((None, None, self.spec.width))
        self.attn.build()
        self.norm2.build((None, None, self.spec.width))
        self.mlp.build()

    def call(
        self, x: Tensor, call: Call, layer: Layer | None = None
    ) -> tuple[Tensor, Tensor | None, Layer | None]:
        if self.spec.placement == "pre":
            y, weights, layer = self.attn(self.norm1(x), call=call, layer=layer)
            x = x + self.dropout(y, call, 0)
            return x + self.dropout(self.mlp(self.norm2(x)), call, 1), weights, layer
        y, weights, layer = self.attn(x, call=call, layer=layer)
        x = self.norm1(x + self.dropout(y, call, 0))
        return self.norm2(x + self.dropout(self.mlp(x), call, 1)), weights, layer

    def dropout(self, x: Tensor, call: Call, place: int) -> Tensor:
        """Dropout of a sub-layer's output."""
        return dropped(x, self.spec.dropout.residual, call.seed, OF_BLOCK * (self.index + 1) + place)


class Backbone(Part):
    """Embeddings, blocks, final norm."""

    def __init__(self, spec: ArchSpec, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spec, policy, width = spec, self.dtype_policy, spec.width
        self.embed = make_table(spec, spec.vocab, width, "embed", policy)
        if learned := spec.position(Learned):
            self.pos_embed = make_table(spec, learned.size, width, "pos_embed", policy)
        if buckets := spec.position(Buckets):
            self.rel_bias = make_table(spec, buckets.count, spec.attention.heads, "rel_bias", policy)
        if spec.patches:
            self.patch_embed = make_linear(spec, width, True, "patch_embed", policy)
        if spec.embed_norm:
            self.embed_norm = NormLayer(spec.embed_norm, name="embed_norm", dtype=policy)
        self.blocks = [Block(spec, i, name=f"blocks.{i}", dtype=policy) for i in range(spec.layers)]
        if spec.final_norm:
            self.final_norm = NormLayer(spec.final_norm, name="final_norm", dtype=policy)
        self.gradient_checkpointing = False

    def make(self) -> None:
        for name in ("embed", "pos_embed", "rel_bias"):
            if hasattr(self, name):
                getattr(self, name).build(None)
        if self.spec.patches:
            self.patch_embed.build((None, self.spec.patches.size))
        for name in ("embed_norm", "final_norm"):
            if hasattr(self, name):
                getattr(self, name).build((None, None, self.spec.width))
        for block in self.blocks:
            block.build()

    def call(
        self,
        x_bsw: Tensor,
        call: Call,
        layers: tuple[Layer, ...] | None = None,
        hidden_states: bool = False,
    ) -> BackboneOutput:
        """Run the blocks on embedded tokens (b, s, w)."""
        spec, scope = self.spec, call.scope
        x = self.embedded(x_bsw, call)
        if alibi := spec.position(Alibi):
            scope = replace(scope, slopes_h=tf.constant(alibi.slopes(spec.attention.heads), tf.float32))
        if buckets := spec.position(Buckets):
            scope = replace(scope, table=rows_of(self.rel_bias), buckets=buckets)
            if layers is None and attention.in_one_block(x.shape[1], scope.causal):  # once for all layers
                ready = biases(rows_of(self.rel_bias), buckets_of(x.shape[1], buckets))
                scope = replace(scope, table=ready, buckets=None)
        if rotary := spec.position(Rotary):
            cos, sin = rotations(call.positions_bs, rotary, x.dtype)
            call = replace(call, cos=cos, sin=sin)
        call = replace(call, scope=scope)
        states, weights, after = [x], [], []
        for block, layer in zip(self.blocks, layers or (None,) * spec.layers, strict=True):
            if self.gradient_checkpointing and call.train and layer is None and not call.attentions:
                x = again(block, x, call)
            else:
                x, weight, layer = block(x, call=call, layer=layer)
                weights.append(weight)
                after.append(layer)
            states.append(x)
        hidden = states[-1] = self.final_norm(x) if spec.final_norm else x
        return BackboneOutput(
            hidden=hidden,
            layers=tuple(after) if layers else None,
            hidden_states=tuple(states) if hidden_states else None,
            attentions=tuple(weights) if call.attentions else None,
        )

    def embedded(self, x: Tensor, call: Call) -> Tensor:
        """Tokens with their positions, norm and dropout; a share of the gradient if the spec says so."""
        if learned := self.spec.position(Learned):
            places = self.pos_embed(call.positions_bs)
            if learned.pad_id is not None:
                places = untrained(places, call.positions_bs == learned.offset - 1)
            x = x + places
        if self.spec.embed_norm:
            x = self.embed_norm(x)
        if (share := self.spec.embed_gradient) != 1.0:
            x = x * share + tf.stop_gradient(x) * (1 - share)
        return dropped(x, self.spec.dropout.embed, call.seed, EMBEDDED)

    def with_patches(self, x_bsw: Tensor, patches: Tensor, rows_bs: Tensor) -> Tensor:
        """The tokens with projected image patches (P, size) in their places: `rows_bs` says which of them each token
        is, -1 for none."""
        vectors = tf.cast(self.patch_embed(patches), x_bsw.dtype)
        taken = tf.gather(vectors, tf.maximum(rows_bs, 0))
        return tf.where((rows_bs >= 0)[..., None], taken, x_bsw)

    def lookup(self, input_ids: Tensor) -> Tensor:
        """Token ids (b, s) as vectors (b, s, w)."""
        x, learned = self.embed(input_ids), self.spec.position(Learned)
        if learned is None or learned.pad_id is None:
            return x
        return untrained(x, input_ids == learned.pad_id)


def untrained(x_bsw: Tensor, padding_bs: Tensor) -> Tensor:
    """Rows of a table, to which no gradient comes from padding that is told by its id."""
    return tf.where(padding_bs[..., None], tf.stop_gradient(x_bsw), x_bsw)


def again(block: Block, x: Tensor, call: Call) -> Tensor:
    """A block of which only the input is kept: the backward pass computes it anew. Tables that every block shares are
    arguments, since a gradient reaches nothing else."""

    def run(x: Tensor, *table: Tensor) -> Tensor:
        scope = replace(call.scope, table=table[0]) if table else call.scope
        return block(x, call=replace(call, scope=scope))[0]

    arguments = (x,) if call.scope.table is None else (x, call.scope.table)
    return tf.recompute_grad(run)(*arguments)
