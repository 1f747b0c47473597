"""One attention, one MLP, one block, one backbone, for every family: they interpret an `ArchSpec`.

    x -> norm1 -> attention -> + -> norm2 -> MLP -> +      (placement "pre")
    x -> attention -> + -> norm1 -> MLP -> + -> norm2      (placement "post")

The parts are Linen's own, so the leaves have Flax's names: `kernel` (inputs, outputs), `scale`, `embedding`, `bias`.
`dtype` is the computation's; parameters keep theirs. Shape suffixes: b batch, s tokens, w width, h heads, g key/value
heads, d head width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from monoblock.backends.flax import attention
from monoblock.backends.flax.cache import Layer
from monoblock.backends.flax.ops import ACT, rotate, rotations
from monoblock.backends.flax.scope import Scope
from monoblock.positions import is_dynamic
from monoblock.spec import Alibi, ArchSpec, Buckets, Learned, Norm, Rotary


@struct.dataclass
class Call:
    """What one forward pass gives to every block.

    Positions, of the tokens that come in and of all places, count tokens without padding; a first axis of 1 stands
    for all rows. `fresh`: no token came before. `max_length` is the cache's.
    """

    scope: Scope
    positions_bs: Array
    key_positions_bk: Array
    cos: Array | None = None
    sin: Array | None = None
    fresh: bool = struct.field(pytree_node=False, default=True)
    max_length: int = struct.field(pytree_node=False, default=0)
    attentions: bool = struct.field(pytree_node=False, default=False)
    train: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class BackboneOutput:
    """The hidden state after the last norm, and what was asked for besides."""

    hidden: Array
    layers: tuple[Layer, ...] | None
    hidden_states: tuple[Array, ...] | None
    attentions: tuple[Array, ...] | None


def make_norm(norm: Norm, dtype: Any) -> nn.Module:
    """The norm as Linen's own module; the statistics are computed in float32 at least."""
    if norm.kind == "rms":
        return nn.RMSNorm(epsilon=norm.eps, dtype=dtype, use_fast_variance=False)
    return nn.LayerNorm(epsilon=norm.eps, use_bias=norm.bias, dtype=dtype, use_fast_variance=False)


def make_linear(spec: ArchSpec, size: int, bias: bool, dtype: Any) -> nn.Dense:
    """A dense layer, begun from the spec's normal distribution."""
    return nn.Dense(size, use_bias=bias, dtype=dtype, kernel_init=nn.initializers.normal(spec.init_std))


def make_table(spec: ArchSpec, rows: int, columns: int, dtype: Any) -> nn.Embed:
    """An embedding, begun from the spec's normal distribution."""
    return nn.Embed(rows, columns, dtype=dtype, embedding_init=nn.initializers.normal(spec.init_std))


class Attention(nn.Module):
    """Self-attention over fused `[q|k|v]`, with grouped heads, clipping, q/k norms, RoPE, ALiBi and windows."""

    spec: ArchSpec
    index: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        spec, att = self.spec, self.spec.attention
        self.sizes = (att.heads * att.head_dim, att.kv_heads * att.head_dim, att.kv_heads * att.head_dim)
        self.qkv = make_linear(spec, sum(self.sizes), att.qkv_bias, self.dtype)
        self.out = make_linear(spec, spec.width, att.out_bias, self.dtype)
        self.by_head = att.qk_norm is not None and att.qk_norm.span == "head"
        if att.qk_norm is not None:
            self.q_norm = make_norm(att.qk_norm.norm, self.dtype)
            self.k_norm = make_norm(att.qk_norm.norm, self.dtype)
        self.window = spec.windows[self.index]
        # Dynamic scaling turns all keys by angles that change with the length: such keys are cached unturned.
        rotary = spec.position(Rotary)
        self.late_rotary = rotary if is_dynamic(rotary) else None

    def __call__(
        self, x_bsw: Array, call: Call, layer: Layer | None
    ) -> tuple[Array, Array | None, Layer | None]:
        q, k, v = self.heads(self.qkv(x_bsw))
        if call.cos is not None and call.sin is not None:
            q = rotate(q, call.cos, call.sin)
            k = k if self.late_rotary else rotate(k, call.cos, call.sin)
        att, p = self.spec.attention, self.spec.dropout.attention if call.train else 0.0
        kernel, weights = attention.Kernel(scale=att.scale, softcap=att.softcap, dropout=p), None
        if layer is not None and self.steps(q, call):
            out, layer = self.next(q, k, v, call, layer, kernel)
        else:
            k, v, scope, layer = self.remembered(k, v, call, layer)
            k, scope = self.turned(k, call, scope), replace(scope, window=self.window)
            key = self.make_rng("dropout") if p else None
            if call.attentions:
                out, weights = attention.attend_eager(q, k, v, scope, kernel, key)
            else:
                out = attention.attend(q, k, v, scope, kernel, key)
        out = out.swapaxes(1, 2).reshape(*x_bsw.shape[:2], self.sizes[0])
        return self.out(out), weights, layer

    def steps(self, q: Array, call: Call) -> bool:
        """Whether this is one token after others, with nothing that needs its key among theirs."""
        return q.shape[2] == 1 and not (call.fresh or call.train or call.attentions or self.late_rotary)

    def next(
        self, q: Array, k: Array, v: Array, call: Call, layer: Layer, kernel: attention.Kernel
    ) -> tuple[Array, Layer]:
        """One token over the cache and itself, and the layer with it."""
        places = jnp.concatenate((layer.places(layer.length), call.scope.index_q))
        scope = replace(call.scope.of_keys(places), window=self.window)
        held = (layer.keys.astype(k.dtype), layer.values.astype(v.dtype))
        out = attention.attend_next(q, (k, v), held, scope, kernel)
        return out, layer.appended(k, v, read_bhnd=out)

    def heads(self, qkv: Array) -> tuple[Array, Array, Array]:
        """Queries (b, h, s, d), keys and values (b, g, s, d), clipped and normed."""
        att = self.spec.attention
        if att.clip is not None:
            qkv = jnp.clip(qkv, -att.clip, att.clip)
        q, k, v = jnp.split(qkv, (self.sizes[0], self.sizes[0] + self.sizes[1]), axis=-1)
        if att.qk_norm is not None and not self.by_head:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.reshape(*x.shape[:2], -1, att.head_dim).swapaxes(1, 2) for x in (q, k, v))
        if self.by_head:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def remembered(
        self, k: Array, v: Array, call: Call, layer: Layer | None
    ) -> tuple[Array, Array, Scope, Layer | None]:
        """The keys and values that these queries see, who sees whom, and the layer of the cache with the new ones."""
        if layer is None or call.fresh:
            return k, v, call.scope, None if layer is None else layer.filled(k, v)
        count, after = k.shape[2], layer.appended(k, v)
        if count == 1 or layer.slots == call.max_length:
            places = after.places(layer.length + count)
            return after.keys, after.values, call.scope.of_keys(places), after
        # A window that rolls: the new tokens would push out what the first of them still see.
        places = jnp.concatenate((layer.places(layer.length), call.scope.index_q))
        k, v = (
            jnp.concatenate((held.astype(new.dtype), new), axis=2)
            for held, new in ((layer.keys, k), (layer.values, v))
        )
        return k, v, call.scope.of_keys(places), after

    def turned(self, k: Array, call: Call, scope: Scope) -> Array:
        """The keys; those that were cached unturned are turned by the angles of today's length."""
        if self.late_rotary is None:
            return k
        last = scope.index_q[-1:]
        length_b = jnp.take(call.key_positions_bk, last, axis=1)[:, 0] + 1
        positions = jnp.take(call.key_positions_bk, jnp.maximum(scope.index_k, 0), axis=1)
        cos, sin = rotations(positions, self.late_rotary, k.dtype, length_b)
        return rotate(k, cos, sin)


class Mlp(nn.Module):
    """`down(act(up(x)))`, or gated; gate and up are one fused `[gate|up]` matrix."""

    spec: ArchSpec
    dtype: Any = jnp.float32

    def setup(self) -> None:
        mlp = self.spec.mlp
        if mlp.gated:
            self.gate_up = make_linear(self.spec, 2 * mlp.width, mlp.bias, self.dtype)
        else:
            self.up = make_linear(self.spec, mlp.width, mlp.bias, self.dtype)
        self.down = make_linear(self.spec, self.spec.width, mlp.bias, self.dtype)

    def __call__(self, x_bsw: Array) -> Array:
        act = ACT[self.spec.mlp.act]
        if self.spec.mlp.gated:
            gate, up = jnp.split(self.gate_up(x_bsw), 2, axis=-1)
            return self.down(act(gate) * up)
        return self.down(act(self.up(x_bsw)))


class Block(nn.Module):
    """Attention and MLP, each with its residual; the norm before the sub-layer or after the sum."""

    spec: ArchSpec
    index: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        spec = self.spec
        self.norm1, self.norm2 = make_norm(spec.norm, self.dtype), make_norm(spec.norm, self.dtype)
        self.attn, self.mlp = Attention(spec, self.index, self.dtype), Mlp(spec, self.dtype)
        self.dropout = nn.Dropout(spec.dropout.residual)

    def __call__(self, x: Array, call: Call, layer: Layer | None) -> tuple[Array, Array | None, Layer | None]:
        rest = not call.train
        if self.spec.placement == "pre":
            y, weights, layer = self.attn(self.norm1(x), call, layer)
            x = x + self.dropout(y, deterministic=rest)
            return x + self.dropout(self.mlp(self.norm2(x)), deterministic=rest), weights, layer
        y, weights, layer = self.attn(x, call, layer)
        x = self.norm1(x + self.dropout(y, deterministic=rest))
        return self.norm2(x + self.dropout(self.mlp(x), deterministic=rest)), weights, layer


class Blocks(nn.Module):
    """The blocks one after the other, named by their numbers. `remat`: the backward pass computes each anew."""

    spec: ArchSpec
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Array, call: Call, layers: tuple[Layer | None, ...]
    ) -> tuple[list[Array], list[Array | None], list[Layer | None]]:
        make = nn.remat(Block) if self.remat and call.train else Block
        states, weights, after = [], [], []
        for i, layer in enumerate(layers):
            x, weight, layer = make(self.spec, i, self.dtype, name=str(i))(x, call, layer)
            states.append(x)
            weights.append(weight)
            after.append(layer)
        return states, weights, after


class Backbone(nn.Module):
    """Embeddings, blocks, final norm."""

    spec: ArchSpec
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        spec, dtype = self.spec, self.dtype
        self.embed = make_table(spec, spec.vocab, spec.width, dtype)
        if learned := spec.position(Learned):
            self.pos_embed = make_table(spec, learned.size, spec.width, dtype)
        if buckets := spec.position(Buckets):
            self.rel_bias = make_table(spec, buckets.count, spec.attention.heads, dtype)
        if spec.patches:
            self.patch_embed = make_linear(spec, spec.width, True, dtype)
        if spec.embed_norm:
            self.embed_norm = make_norm(spec.embed_norm, dtype)
        self.dropout = nn.Dropout(spec.dropout.embed)
        self.blocks = Blocks(spec, dtype, self.remat)
        if spec.final_norm:
            self.final_norm = make_norm(spec.final_norm, dtype)

    def run(
        self, x_bsw: Array, call: Call, layers: tuple[Layer, ...] | None, hidden_states: bool
    ) -> BackboneOutput:
        """Run the blocks on embedded tokens (b, s, w)."""
        spec = self.spec
        x = self.embedded(x_bsw, call)
        scope = call.scope
        if alibi := spec.position(Alibi):
            scope = replace(scope, slopes_h=jnp.asarray(alibi.slopes(spec.attention.heads), jnp.float32))
        if buckets := spec.position(Buckets):
            scope = replace(scope, table=self.rel_bias.embedding, buckets=buckets)
        if rotary := spec.position(Rotary):
            cos, sin = rotations(call.positions_bs, rotary, x.dtype)
            call = replace(call, cos=cos, sin=sin)
        none = (None,) * spec.layers
        states, weights, after = self.blocks(x, replace(call, scope=scope), layers or none)
        hidden = self.final_norm(states[-1]) if spec.final_norm else states[-1]
        return BackboneOutput(
            hidden=hidden,
            layers=tuple(after) if layers else None,  # pyright: ignore[reportArgumentType]
            hidden_states=(x, *states[:-1], hidden) if hidden_states else None,
            attentions=tuple(weights) if call.attentions else None,  # pyright: ignore[reportArgumentType]
        )

    def embedded(self, x: Array, call: Call) -> Array:
        """Tokens with their positions, norm and dropout; a share of the gradient if the spec says so."""
        if learned := self.spec.position(Learned):
            places = self.pos_embed(call.positions_bs)
            if learned.pad_id is not None:
                places = untrained(places, call.positions_bs == learned.offset - 1)
            x = x + places
        if self.spec.embed_norm:
            x = self.embed_norm(x)
        if (share := self.spec.embed_gradient) != 1.0:
            x = x * share + jax.lax.stop_gradient(x) * (1 - share)
        return self.dropout(x, deterministic=not call.train)

    def with_patches(self, x_bsw: Array, patches: Array, rows_bs: Array) -> Array:
        """The tokens with projected image patches (P, size) in their places: `rows_bs` says which of them each token
        is, -1 for none."""
        vectors = self.patch_embed(patches).astype(x_bsw.dtype)
        taken = jnp.take(vectors, jnp.maximum(rows_bs, 0), axis=0)
        return jnp.where(rows_bs[..., None] >= 0, taken, x_bsw)

    def lookup(self, input_ids: Array) -> Array:
        """Token ids (b, s) as vectors (b, s, w)."""
        x, learned = self.embed(input_ids), self.spec.position(Learned)
        if learned is None or learned.pad_id is None:
            return x
        return untrained(x, input_ids == learned.pad_id)


def untrained(x_bsw: Array, padding_bs: Array) -> Array:
    """Rows of a table, to which no gradient comes from padding that is told by its id."""
    return jnp.where(padding_bs[..., None], jax.lax.stop_gradient(x_bsw), x_bsw)
