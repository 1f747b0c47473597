"""One attention, one MLP, one block, for every family: they interpret an `ArchSpec`.

    x -> norm1 -> attention -> + -> norm2 -> MLP -> +      (placement "pre")
    x -> attention -> + -> norm1 -> MLP -> + -> norm2      (placement "post")

Each part looks its modules up by role; the module tree (names, what holds what) is the family's table. `dtype` is the
computation's; parameters keep theirs. Shape suffixes: b batch, s tokens, w width, h heads, g key/value heads, d head
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
class StackOutput:
    """The hidden state after the last norm, those after the embedding and after each layer, the layers' attention
    weights, and their parts of the cache."""

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
        # Dynamic scaling turns all keys by angles that change with the length: such keys are cached unturned.
        rotary = spec.position(Rotary)
        self.late_rotary = rotary if is_dynamic(rotary) else None

    def __call__(
        self, x_bsw: Array, context: ForwardContext, layer: CacheLayer | None
    ) -> tuple[Array, Array | None, CacheLayer | None]:
        q, k, v = self.heads(*self.projected(x_bsw))
        if context.cos is not None and context.sin is not None:
            q = rotate(q, context.cos, context.sin)
            k = k if self.late_rotary else rotate(k, context.cos, context.sin)
        att, p = self.spec.attention, self.spec.dropout.attention if context.train else 0.0
        kernel, weights = attention.Kernel(scale=att.scale, softcap=att.softcap, dropout=p), None
        if layer is not None and self.steps(q, context):
            out, layer = self.next(q, k, v, context, layer, kernel)
        else:
            k, v, scope, layer = self.remembered(k, v, context, layer)
            k, scope = self.turned(k, context, scope), replace(scope, window=self.window)
            key = self.make_rng("dropout") if p else None
            if context.attentions:
                out, weights = attention.attend_eager(q, k, v, scope, kernel, key)
            else:
                out = attention.attend(q, k, v, scope, kernel, key)
        out = out.swapaxes(1, 2).reshape(*x_bsw.shape[:2], self.sizes[0])
        out = self.role("out")(out)
        return self.dropped(out, "out_drop", self.spec.dropout.residual, context.train), weights, layer

    def projected(self, x_bsw: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values, (b, s, h * d); (b, s, h, d) where each head's lie together."""
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

    def steps(self, q: Array, context: ForwardContext) -> bool:
        """Whether this is one token after others, with nothing that needs its key among theirs."""
        return q.shape[2] == 1 and not (
            context.fresh or context.train or context.attentions or self.late_rotary
        )

    def next(
        self,
        q: Array,
        k: Array,
        v: Array,
        context: ForwardContext,
        layer: CacheLayer,
        kernel: attention.Kernel,
    ) -> tuple[Array, CacheLayer]:
        """One token over the cache and itself, and the layer with it."""
        places = jnp.concatenate((layer.token_indices(layer.length), context.scope.index_q))
        scope = replace(context.scope.of_keys(places), window=self.window)
        held = (layer.keys.astype(k.dtype), layer.values.astype(v.dtype))
        out = attention.attend_next(q, (k, v), held, scope, kernel)
        return out, layer.appended(k, v, read_bhnd=out)

    def heads(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """Queries (b, h, s, d), keys and values (b, g, s, d), clipped and normed, of projections (b, s, h * d) or
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

    def remembered(
        self, k: Array, v: Array, context: ForwardContext, layer: CacheLayer | None
    ) -> tuple[Array, Array, Scope, CacheLayer | None]:
        """The keys and values to attend to, the attention mask, and the layer of the cache with the new ones."""
        if layer is None or context.fresh:
            return k, v, context.scope, None if layer is None else layer.filled(k, v)
        count, after = k.shape[2], layer.appended(k, v)
        if count == 1 or layer.slots == context.max_length:
            places = after.token_indices(layer.length + count)
            return after.keys, after.values, context.scope.of_keys(places), after
        # A window that rolls: the new tokens would push out what the first of them still see.
        places = jnp.concatenate((layer.token_indices(layer.length), context.scope.index_q))
        k, v = (
            jnp.concatenate((held.astype(new.dtype), new), axis=2)
            for held, new in ((layer.keys, k), (layer.values, v))
        )
        return k, v, context.scope.of_keys(places), after

    def turned(self, k: Array, context: ForwardContext, scope: Scope) -> Array:
        """The keys; those that were cached unturned are turned by the angles of today's length."""
        if self.late_rotary is None:
            return k
        last = scope.index_q[-1:]
        length_b = jnp.take(context.key_positions_bk, last, axis=1)[:, 0] + 1
        positions = jnp.take(context.key_positions_bk, jnp.maximum(scope.index_k, 0), axis=1)
        cos, sin = rotations(positions, self.late_rotary, k.dtype, length_b)
        return rotate(k, cos, sin)


@computes("wrapper")
class Wrapper(Part):
    """Calls the attention that it holds."""

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
    """The same with dropout, and added to the residual."""

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
    """Attention and MLP, each with its residual; the norm before the sub-layer or after the sum."""

    def __call__(
        self, x: Array, context: ForwardContext, layer: CacheLayer | None
    ) -> tuple[Array, Array | None, CacheLayer | None]:
        train = context.train
        if self.has("attention_norm"):  # sub-layers that add and norm by themselves
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
        """With the block's own dropout, where there is one."""
        return self.dropped(y, "layer_drop", self.spec.dropout.residual, train)


# ---------------------------------------------------------------------------- model


@computes("embeddings")
class Embeddings(Part):
    """Embedded tokens with positions, norm and dropout."""

    def __call__(self, x_bsw: Array, context: ForwardContext) -> Array:
        return positioned(self, x_bsw, context)


def positioned(part: Part, x: Array, context: ForwardContext) -> Array:
    """Embedded tokens with their positions, norm and dropout; a share of the gradient if the spec says so."""
    spec = part.spec
    if learned := spec.position(Learned):
        places = part.role("pos_embed")(context.positions_bs)
        if learned.pad_id is not None:
            places = untrained(places, context.positions_bs == learned.offset - 1)
        x = x + places
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
    """A bare model inside one with a head, which calls the functions below on it."""


def lookup(bare: Any, input_ids: Array, gathering: Gathering | None = None) -> Array:
    """Token ids (b, s) as vectors (b, s, w)."""
    table, learned = bare.at("embed"), bare.spec.position(Learned)
    x = table(input_ids) if gathering is None else gathering.looked_up(table, input_ids)
    if learned is None or learned.pad_id is None:
        return x
    return untrained(x, input_ids == learned.pad_id)


def with_patches(bare: Any, x_bsw: Array, patches: Array, rows_bs: Array) -> Array:
    """The tokens with projected image patches (P, size) in their places: `rows_bs` says which of them each token is, -1
    for none."""
    vectors = bare.at("patch_embed")(patches).astype(x_bsw.dtype)
    taken = jnp.take(vectors, jnp.maximum(rows_bs, 0), axis=0)
    return jnp.where(rows_bs[..., None] >= 0, taken, x_bsw)


def hidden_states(
    bare: Any, x_bsw: Array, context: ForwardContext, layers: tuple[CacheLayer | None, ...]
) -> StackOutput:
    """Everything between the embedded tokens and the head."""
    embed = bare.role("embeddings") if bare.has("embeddings") else None
    x = positioned(bare, x_bsw, context) if embed is None else embed(x_bsw, context)
    if bare.has("stack"):
        return bare.role("stack")(x, context, layers)
    return run_layers(bare, x, context, layers)


def untrained(x_bsw: Array, padding_bs: Array) -> Array:
    """Rows of a table, to which no gradient comes from padding that is told by its id."""
    return jnp.where(padding_bs[..., None], jax.lax.stop_gradient(x_bsw), x_bsw)
