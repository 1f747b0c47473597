"""Attention; no heads x queries x keys array is allocated unless the attention weights are returned.

Shape suffixes: b batch, q queries, k keys, h heads, g key/value heads (h / g heads share one), d head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array, lax

from monoblock.backends.flax.ops import LOWEST
from monoblock.backends.flax.scope import Scope
from monoblock.backends.xla.namespace import is_static

# Queries per block of the blockwise kernel, fewer if its scores exceed MAX_SCORE_BYTES. A long causal sequence is
# split CAUSAL_SPLITS ways, each with the keys up to its own end: with four, 5/8 of the score matrix is computed.
QUERY_BLOCK = 128
MAX_SCORE_BYTES = 128 * 2**20
CAUSAL_SPLITS = 4


@dataclass(frozen=True)
class Kernel:
    """The parameters of attention in one layer: the factor on q·k, the soft cap on scores, the dropout probability."""

    scale: float
    softcap: float | None = None
    dropout: float = 0.0


def attend(
    q_bhqd: Array, k_bgkd: Array, v_bgkd: Array, scope: Scope, kernel: Kernel, key: Array | None = None
) -> Array:
    """Attention, (b, h, q, d), blockwise over the queries if there are many. `key`: the PRNG key of the dropout."""
    if is_static(q_bhqd.shape[2]) and q_bhqd.shape[2] <= _block_size(q_bhqd, k_bgkd, scope):
        out = _block(q_bhqd, k_bgkd, v_bgkd, scope, kernel, key)
    else:
        out = _blockwise(q_bhqd, k_bgkd, v_bgkd, scope, kernel, key)
    return fill_fully_masked(out, v_bgkd, scope)


def _block_size(q_bhqd: Array, k_bgkd: Array, scope: Scope) -> int:
    """The queries per block: `QUERY_BLOCK`, or with many keys a smaller power of two. Dynamic sizes (of an export) do
    not reduce it."""
    rows, heads, keys = q_bhqd.shape[0], q_bhqd.shape[1], k_bgkd.shape[2]
    if not is_static(rows, keys):
        return QUERY_BLOCK
    if scope.aligned and scope.window is not None:
        keys = min(keys, scope.window + QUERY_BLOCK)
    size, row = QUERY_BLOCK, 4 * rows * heads * keys
    while size > 1 and size * row > MAX_SCORE_BYTES:
        size //= 2
    return size


def fill_fully_masked(out_bhqd: Array, v_bgkd: Array, scope: Scope) -> Array:
    """Give fully masked queries equal weights on the keys that the spec selects, so that all kernels agree on padding
    too, which a loss over all positions of a row (question answering) includes."""
    if (masked := scope.fully_masked()) is None:
        return out_bhqd
    return jnp.where(masked, repeat_groups(scope.mean(v_bgkd), out_bhqd.shape[1]), out_bhqd)


def _block(
    q_bhqd: Array, k_bgkd: Array, v_bgkd: Array, scope: Scope, kernel: Kernel, key: Array | None
) -> Array:
    # On CPUs, the plain formula takes half the time of jax.nn.dot_product_attention, which transposes q, k and v.
    return _weighted(weights(q_bhqd, k_bgkd, scope, kernel, key), v_bgkd).astype(q_bhqd.dtype)


def attend_one_token(
    q_bh1d: Array, new: tuple[Array, Array], cached: tuple[Array, Array], scope: Scope, kernel: Kernel
) -> Array:
    """Attention of one token over the cached keys and values and its own, (b, h, 1, d).

    `scope` has the cached keys first and the token's last. The cached arrays are not concatenated with the new ones, so
    that a loop makes no copy of them.
    """
    (k_bgkd, v_bgkd), (k_bg1d, v_bg1d) = cached, new
    g, d = k_bg1d.shape[1], k_bg1d.shape[3]
    # Keys are the left operand: otherwise XLA transposes the cache for each token.
    q_bgrd = q_bh1d.reshape(q_bh1d.shape[0], g, -1, d)
    product = (((3,), (3,)), ((0, 1), (0, 1)))
    scores = lax.dot_general(k_bgkd, q_bgrd, product, preferred_element_type=jnp.float32).swapaxes(2, 3)
    own = lax.dot_general(q_bgrd, k_bg1d, product, preferred_element_type=jnp.float32)
    scores = jnp.concatenate((scores, own), axis=-1).reshape(*q_bh1d.shape[:3], -1) * kernel.scale
    exps, total = _exponentials(scores, scope, kernel, None)
    out = _weighted(exps[..., :-1], v_bgkd) + _weighted(exps[..., -1:], v_bg1d)
    return (out / total).astype(q_bh1d.dtype)


def _blockwise(
    q_bhqd: Array, k_bgkd: Array, v_bgkd: Array, scope: Scope, kernel: Kernel, key: Array | None
) -> Array:
    """A loop over blocks of queries; the backward pass recomputes each block's weights."""
    length, size = q_bhqd.shape[2], _block_size(q_bhqd, k_bgkd, scope)
    blocks = -(-length // size)
    padding = blocks * size - length
    q_bhqd = jnp.pad(q_bhqd, ((0, 0), (0, 0), (0, padding), (0, 0)))
    scope = replace(
        scope,
        index_q=jnp.pad(scope.index_q, (0, padding)),
        segment_bq=None if scope.segment_bq is None else jnp.pad(scope.segment_bq, ((0, 0), (0, padding))),
    )
    whole = is_static(length) and (scope.window is None or scope.window >= length)
    splits = CAUSAL_SPLITS if whole and scope.aligned and scope.causal and blocks >= CAUSAL_SPLITS else 1
    ends = [-(-blocks * (i + 1) // splits) for i in range(splits)]
    out = []
    for begin, end in zip([0, *ends], ends, strict=False):
        keys = min(end * size, k_bgkd.shape[2]) if splits > 1 else k_bgkd.shape[2]

        @jax.checkpoint
        def block(index: Array, keys: int = keys) -> Array:
            return _query_block(index, size, keys, (q_bhqd, k_bgkd, v_bgkd), scope, kernel, key)

        out.append(lax.map(block, jnp.arange(begin, end)))
    joined = jnp.concatenate(out) if len(out) > 1 else out[0]  # (blocks, b, h, q, d)
    return joined.transpose(1, 2, 0, 3, 4).reshape(q_bhqd.shape)[:, :, :length]


def _query_block(
    index: Array,
    size: int,
    keys: int,
    qkv: tuple[Array, Array, Array],
    scope: Scope,
    kernel: Kernel,
    key: Array | None,
) -> Array:
    """Block `index` of `size` queries, over the first `keys` keys or those of its window."""
    q_bhqd, k_bgkd, v_bgkd = qkv
    start, first = index * size, 0
    if scope.aligned and scope.window is not None and is_static(keys) and scope.window + size - 1 < keys:
        first = jnp.clip(start - scope.window + 1, 0, keys - (scope.window + size - 1))
        keys = scope.window + size - 1
    return _block(
        lax.dynamic_slice_in_dim(q_bhqd, start, size, axis=2),
        lax.dynamic_slice_in_dim(k_bgkd, first, keys, axis=2),
        lax.dynamic_slice_in_dim(v_bgkd, first, keys, axis=2),
        scope.block(start, size, first, keys),
        kernel,
        None if key is None else jax.random.fold_in(key, index),
    )


def attend_eager(
    q_bhqd: Array, k_bgkd: Array, v_bgkd: Array, scope: Scope, kernel: Kernel, key: Array | None = None
) -> tuple[Array, Array]:
    """Attention with scores and softmax in fp32; the output and the weights (b, h, q, k) after dropout."""
    found = weights(q_bhqd, k_bgkd, scope, kernel, key)
    if (masked := scope.fully_masked()) is not None:
        # Set explicitly, so that masked scores get no gradient.
        found = jnp.where(masked, scope.equal_weights().astype(found.dtype), found)
    return _weighted(found, v_bgkd).astype(q_bhqd.dtype), found


def weights(q_bhqd: Array, k_bgkd: Array, scope: Scope, kernel: Kernel, key: Array | None) -> Array:
    """The attention weights (b, h, q, k) in the queries' dtype."""
    exps, total = _exponentials(_scores(q_bhqd, k_bgkd, kernel.scale), scope, kernel, key)
    return (exps / total).astype(q_bhqd.dtype)


def _scores(q_bhqd: Array, k_bgkd: Array, scale: float) -> Array:
    """q·k in fp32, (b, h, q, k). Keys are not repeated: the heads of a group are stacked along the queries."""
    b, h, q, d = q_bhqd.shape
    q_bgqd = q_bhqd.reshape(b, k_bgkd.shape[1], -1, d)
    scores = jnp.einsum("bgqd,bgkd->bgqk", q_bgqd, k_bgkd, preferred_element_type=jnp.float32)
    return scores.reshape(b, h, q, -1) * scale


def _exponentials(scores: Array, scope: Scope, kernel: Kernel, key: Array | None) -> tuple[Array, Array]:
    """A softmax before its division, after soft cap, bias, mask and dropout: exponentials (b, h, q, k), sums (b, h, q,
    1)."""
    if kernel.softcap is not None:
        scores = kernel.softcap * jnp.tanh(scores / kernel.softcap)
    if (bias := scope.bias()) is not None:
        scores = scores + bias
    scores = jnp.where(scope.visible(), scores, LOWEST)
    exps = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = exps.sum(axis=-1, keepdims=True)
    if kernel.dropout and key is not None:
        kept = jax.random.bernoulli(key, 1 - kernel.dropout, exps.shape)
        exps = jnp.where(kept, exps / (1 - kernel.dropout), 0.0)
    return exps, total


def _weighted(weights_bhqk: Array, v_bgkd: Array) -> Array:
    """The weighted sum of values, (b, h, q, d) in fp32; weights need not sum to 1."""
    b, h, q, k = weights_bhqk.shape
    g, d = v_bgkd.shape[1], v_bgkd.shape[3]
    weights_bgqk = weights_bhqk.astype(v_bgkd.dtype).reshape(b, g, -1, k)
    out = jnp.einsum("bgqk,bgkd->bgqd", weights_bgqk, v_bgkd, preferred_element_type=jnp.float32)
    return out.reshape(b, h, q, d)


def repeat_groups(x_bgkd: Array, heads: int) -> Array:
    """Keys or values of `g` groups repeated for `heads` heads; adjacent heads share a group."""
    groups = x_bgkd.shape[1]
    return x_bgkd if groups == heads else jnp.repeat(x_bgkd, heads // groups, axis=1)
