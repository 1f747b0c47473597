"""The attention, MLP and block of all families, configured by an `ArchSpec`.

    x -> norm1 -> attention -> + -> norm2 -> MLP -> +      (placement "pre")
    x -> attention -> + -> norm1 -> MLP -> + -> norm2      (placement "post")

Modules are looked up by role; the family's table defines the module tree and its names. `dtype` is the dtype of the
computation, not of the parameters. Shape suffixes: b batch, s tokens, w width, h heads, g key/value heads, d head
width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from monoblock.backends.flax import attention
from monoblock.backends.flax.cache import CacheLayer
from monoblock.backends.flax.gathering import Gathering
from monoblock.backends.flax.ops import ACT, rotate, rotations
from monoblock.backends.flax.parts import Part, computes, dropout
from monoblock.backends.flax.scope import Scope
from monoblock.positions import is_dynamic
from monoblock.spec import Alibi, Buckets, Learned, Rotary


@struct.dataclass
class ForwardContext:
    """Inputs of all blocks in one forward pass.

    Positions, of the new tokens and of all keys, count tokens without padding; a first axis of 1 stands for all rows.
    `fresh`: there are no past tokens. `max_length` is the cache's.
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
class StackOutput:
    """The final hidden state (after the last norm), the hidden states after the embedding and each layer, the layers'
    attention weights and their caches."""

    hidden: Array
    hidden_states: tuple[Array, ...]
    attentions: tuple[Array | None, ...]
    layers: tuple[CacheLayer | None, ...]


# ---------------------------------------------------------------------------- attention


@computes("attention")
class Attention(Part):
    """Self-attention with grouped heads, clipping, q/k norms, RoPE, ALiBi and windows."""

    def setup(self) -> None:
        super().setup()
        spec, att = self.spec, self.spec.attention
        self.sizes = (att.heads * att.head_dim, att.kv_heads * att.head_dim, att.kv_heads * att.head_dim)
        self.by_head = att.qk_norm is not None and att.qk_norm.span == "head"
        self.window = spec.windows[self.index]
        # With dynamic RoPE scaling, the angles of all keys depend on the length: keys are cached before RoPE.
        rotary = spec.position(Rotary)
        self.late_rotary = rotary if is_dynamic(rotary) else None

    def __call__(
        self, x_bsw: Array, context: ForwardContext, layer: CacheLayer | None
    ) -> tuple[Array, Array | None, CacheLayer | None]:
        q, k, v = self.heads(*self.project(x_bsw))
        if context.cos is not None and context.sin is not None:
            q = rotate(q, context.cos, context.sin)
            k = k if self.late_rotary else rotate(k, context.cos, context.sin)
        att, p = self.spec.attention, self.spec.dropout.attention if context.train else 0.0
        kernel, weights = attention.Kernel(scale=att.scale, softcap=att.softcap, dropout=p), None
        if layer is not None and self.is_decode_step(q, context):
            out, layer = self.decode_step(q, k, v, context, layer, kernel)
        else:
            k, v, scope, layer = self.update_cache(k, v, context, layer)
            k, scope = self.rotate_cached_keys(k, context, scope), replace(scope, window=self.window)
            key = self.make_rng("dropout") if p else None
            if context.attentions:
                out, weights = attention.attend_eager(q, k, v, scope, kernel, key)
            else:
                out = attention.attend(q, k, v, scope, kernel, key)
        out = out.swapaxes(1, 2).reshape(*x_bsw.shape[:2], self.sizes[0])
        out = self.role("out")(out)
        return self.dropped(out, "out_drop", self.spec.dropout.residual, context.train), weights, layer

    def project(self, x_bsw: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values, (b, s, h * d); (b, s, h, d) if the projection is interleaved by head."""
        if self.has("qkv_by_head"):
            att = self.spec.attention
            qkv = self.role("qkv_by_head")(x_bsw).reshape(*x_bsw.shape[:2], att.heads, 3, att.head_dim)
            return qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]
        if self.has("qkv"):
            q, k, v = jnp.split(
                self.role("qkv")(x_bsw), (self.sizes[0], self.sizes[0] + self.sizes[1]), axis=-1
            )
            return q, k, v
        return self.role("q")(x_bsw), self.role("k")(x_bsw), self.role("v")(x_bsw)

    def is_decode_step(self, q: Array, context: ForwardContext) -> bool:
        """Whether this is a decode step (one token after past ones) without options that need all keys in one array."""
        return q.shape[2] == 1 and not (
            context.fresh or context.train or context.attentions or self.late_rotary
        )

    def decode_step(
        self,
        q: Array,
        k: Array,
        v: Array,
        context: ForwardContext,
        layer: CacheLayer,
        kernel: attention.Kernel,
    ) -> tuple[Array, CacheLayer]:
        """Attention of one token over the cached keys and its own, and the updated cache."""
        index_k = jnp.concatenate((layer.token_indices(layer.length), context.scope.index_q))
        scope = replace(context.scope.of_keys(index_k), window=self.window)
        cached = (layer.keys.astype(k.dtype), layer.values.astype(v.dtype))
        out = attention.attend_one_token(q, (k, v), cached, scope, kernel)
        return out, layer.appended(k, v, read_bhnd=out)

    def heads(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """Queries (b, h, s, d), keys and values (b, g, s, d), clipped and normed, from projections (b, s, h * d) or
        (b, s, h, d)."""
        att = self.spec.attention
        if att.clip is not None:
            q, k, v = (jnp.clip(x, -att.clip, att.clip) for x in (q, k, v))
        if att.qk_norm is not None and not self.by_head:
            q, k = (self.role(f"{n}_norm")(x.reshape(*x.shape[:2], -1)) for n, x in (("q", q), ("k", k)))
        q, k, v = (x.reshape(*x.shape[:2], -1, att.head_dim).swapaxes(1, 2) for x in (q, k, v))
        if self.by_head:
            q, k = self.role("q_norm")(q), self.role("k_norm")(k)
        return q, k, v

    def update_cache(
        self, k: Array, v: Array, context: ForwardContext, layer: CacheLayer | None
    ) -> tuple[Array, Array, Scope, CacheLayer | None]:
        """The keys and values to attend to, their attention mask, and the updated cache."""
        if layer is None or context.fresh:
            return k, v, context.scope, None if layer is None else layer.filled(k, v)
        count, after = k.shape[2], layer.appended(k, v)
        if count == 1 or layer.slots == context.max_length:
            index_k = after.token_indices(layer.length + count)
            return after.keys, after.values, context.scope.of_keys(index_k), after
        # A ring buffer: the new tokens overwrite keys that the first of them still attend to.
        index_k = jnp.concatenate((layer.token_indices(layer.length), context.scope.index_q))
        k, v = (
            jnp.concatenate((cached.astype(new.dtype), new), axis=2)
            for cached, new in ((layer.keys, k), (layer.values, v))
        )
        return k, v, context.scope.of_keys(index_k), after

    def rotate_cached_keys(self, k: Array, context: ForwardContext, scope: Scope) -> Array:
        """The keys; with dynamic scaling, cached keys are rotated by the angles of the current length."""
        if self.late_rotary is None:
            return k
        last = scope.index_q[-1:]
        length_b = jnp.take(context.key_positions_bk, last, axis=1)[:, 0] + 1
        positions = jnp.take(context.key_positions_bk, jnp.maximum(scope.index_k, 0), axis=1)
        cos, sin = rotations(positions, self.late_rotary, k.dtype, length_b)
        return rotate(k, cos, sin)


@computes("wrapper")
class Wrapper(Part):
    """A module that only contains the attention."""

    def __call__(
        self, x_bsw: Array, context: ForwardContext, layer: CacheLayer | None
    ) -> tuple[Array, Array | None, CacheLayer | None]:
        return self.role("attention")(x_bsw, context, layer)


@computes("attention_norm")
class AttentionNorm(Part):
    """`norm(x + dropout(attention(x)))`."""

    def __call__(
        self, x: Array, context: ForwardContext, layer: CacheLayer | None
    ) -> tuple[Array, Array | None, CacheLayer | None]:
        y, weights, layer = self.role("attention")(x, context, layer)
        y = self.dropped(y, "out_drop", self.spec.dropout.residual, context.train)
        return self.role("norm1")(y + x), weights, layer


# ---------------------------------------------------------------------------- MLP


@computes("mlp")
class Mlp(Part):
    """`down(act(up(x)))`, or gated: `down(act(gate(x)) * up(x))`."""

    def __call__(self, x_bsw: Array, train: bool) -> Array:
        return self.dropped(mlp(self, x_bsw), "mlp_drop", self.spec.dropout.residual, train)


@computes("mlp_add")
class MlpAdd(Part):
    """An MLP with dropout, added to the residual."""

    def __call__(self, x_bsw: Array, residual_bsw: Array, train: bool) -> Array:
        y = mlp(self, x_bsw)
        return dropout(self, y, self.spec.dropout.residual, train) + residual_bsw


def mlp(part: Part, x_bsw: Array) -> Array:
    """`down(act(up(x)))`, or gated."""
    act = ACT[part.spec.mlp.act]
    if part.has("gate_up"):
        gate, up = jnp.split(part.role("gate_up")(x_bsw), 2, axis=-1)
        return part.role("down")(act(gate) * up)
    if part.spec.mlp.gated:
        return part.role("down")(act(part.role("gate")(x_bsw)) * part.role("up")(x_bsw))
    return part.role("down")(act(part.role("up")(x_bsw)))


@computes("widen")
class Widen(Part):
    """`act(up(x))`."""

    def __call__(self, x: Array) -> Array:
        return ACT[self.spec.mlp.act](self.role("up")(x))


@computes("narrow")
class Narrow(Part):
    """`norm(dropout(down(x)) + residual)`."""

    def __call__(self, x: Array, residual: Array, train: bool) -> Array:
        y = self.dropped(self.role("down")(x), "mlp_drop", self.spec.dropout.residual, train)
        return self.role("norm2")(y + residual)


# ---------------------------------------------------------------------------- block


@computes("layer")
class Block(Part):
    """Attention and MLP, each with a residual connection, pre-norm or post-norm."""

    def __call__(
        self, x: Array, context: ForwardContext, layer: CacheLayer | None
    ) -> tuple[Array, Array | None, CacheLayer | None]:
        train = context.train
        if self.has("attention_norm"):  # sub-layers include the residual and the norm
            x, weights, layer = self.role("attention_norm")(x, context, layer)
            return self.role("narrow")(self.role("widen")(x), x, train), weights, layer
        attend = self.role("wrapper" if self.has("wrapper") else "attention")
        if self.spec.placement == "post":
            y, weights, layer = attend(x, context, layer)
            x = self.role("norm1")(x + y)
            return self.role("norm2")(x + self.role("mlp")(x, train)), weights, layer
        y, weights, layer = attend(self.role("norm1")(x), context, layer)
        if self.has("mlp_add"):
            x = x + self.with_dropout(y, train)
            return self.role("mlp_add")(self.role("norm2")(x), x, train), weights, layer
        x = x + y
        return x + self.with_dropout(self.role("mlp")(self.role("norm2")(x), train), train), weights, layer

    def with_dropout(self, y: Array, train: bool) -> Array:
        """Apply the block's dropout, if it has one."""
        return self.dropped(y, "layer_drop", self.spec.dropout.residual, train)


# ---------------------------------------------------------------------------- model


@computes("embeddings")
class Embeddings(Part):
    """Adds position embeddings, norm and dropout to embedded tokens."""

    def __call__(self, x_bsw: Array, context: ForwardContext) -> Array:
        return positioned(self, x_bsw, context)


def positioned(part: Part, x: Array, context: ForwardContext) -> Array:
    """Add position embeddings, norm and dropout; `spec.embed_gradient` scales the gradient."""
    spec = part.spec
    if learned := spec.position(Learned):
        positions = part.role("pos_embed")(context.positions_bs)
        if learned.pad_id is not None:
            positions = stop_padding_gradient(positions, context.positions_bs == learned.offset - 1)
        x = x + positions
    if spec.embed_norm:
        x = part.role("embed_norm")(x)
    if (share := spec.embed_gradient) != 1.0:
        x = x * share + jax.lax.stop_gradient(x) * (1 - share)
    return dropout(part, x, spec.dropout.embed, context.train)


@computes("stack")
class Stack(Part):
    """All layers and the final norm."""

    def __call__(
        self, x_bsw: Array, context: ForwardContext, layers: tuple[CacheLayer | None, ...]
    ) -> StackOutput:
        return run_layers(self, x_bsw, context, layers)


def run_layers(
    part: Part, x: Array, context: ForwardContext, layers: tuple[CacheLayer | None, ...]
) -> StackOutput:
    """All layers and the final norm, on embedded tokens (b, s, w)."""
    spec, scope = part.spec, context.scope
    if alibi := spec.position(Alibi):
        scope = replace(scope, slopes_h=jnp.asarray(alibi.slopes(spec.attention.heads), jnp.float32))
    if buckets := spec.position(Buckets):
        scope = replace(scope, table=part.role("rel_bias").embedding, buckets=buckets)
    if rotary := spec.position(Rotary):
        cos, sin = rotations(context.positions_bs, rotary, x.dtype)
        context = replace(context, cos=cos, sin=sin)
    states, weights, after = part.role("layers")(x, replace(context, scope=scope), layers)
    hidden = part.role("final_norm")(states[-1]) if part.has("final_norm") else states[-1]
    return StackOutput(
        hidden=hidden,
        hidden_states=(x, *states[:-1], hidden),
        attentions=tuple(weights),
        layers=tuple(after),
    )


@computes("model")
class BareModel(Part):
    """The bare model inside a model with a head, which calls the functions below on it."""


def embed_tokens(bare: Any, input_ids: Array, gathering: Gathering | None = None) -> Array:
    """The embeddings (b, s, w) of token ids (b, s)."""
    table, learned = bare.at("embed"), bare.spec.position(Learned)
    x = table(input_ids) if gathering is None else gathering.embed(table, input_ids)
    if learned is None or learned.pad_id is None:
        return x
    return stop_padding_gradient(x, input_ids == learned.pad_id)


def with_patches(bare: Any, x_bsw: Array, patches: Array, rows_bs: Array) -> Array:
    """Replace tokens by projected image patches (P, size); `rows_bs`: the index of each token's patch, -1 for text."""
    vectors = bare.at("patch_embed")(patches).astype(x_bsw.dtype)
    taken = jnp.take(vectors, jnp.maximum(rows_bs, 0), axis=0)
    return jnp.where(rows_bs[..., None] >= 0, taken, x_bsw)


def hidden_states(
    bare: Any, x_bsw: Array, context: ForwardContext, layers: tuple[CacheLayer | None, ...]
) -> StackOutput:
    """The stack of layers on embedded tokens, with position embeddings before."""
    embed = bare.role("embeddings") if bare.has("embeddings") else None
    x = positioned(bare, x_bsw, context) if embed is None else embed(x_bsw, context)
    if bare.has("stack"):
        return bare.role("stack")(x, context, layers)
    return run_layers(bare, x, context, layers)


def stop_padding_gradient(x_bsw: Array, padding_bs: Array) -> Array:
    """Embeddings without a gradient at padding, as with PyTorch's `padding_idx`."""
    return jnp.where(padding_bs[..., None], jax.lax.stop_gradient(x_bsw), x_bsw)
