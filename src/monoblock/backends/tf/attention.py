"""Attention; no heads x queries x keys array is allocated unless the attention weights are returned.

Shape suffixes: b batch, q queries, k keys, h heads, g key/value heads (h / g heads share one), d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import tensorflow as tf

from monoblock.backends.tf.ops import LOWEST, Size, Tensor, cut, dropped, size
from monoblock.backends.tf.scope import Scope

# Queries per block of the blockwise kernel, and the number of blocks up to which a graph is unrolled, each block with
# the keys up to its own end; longer sequences, and those of dynamic length, run in a loop.
QUERY_BLOCK = 256
UNROLLED = 16


@dataclass(frozen=True)
class Kernel:
    """The parameters of attention in one layer: the factor on q·k, the soft cap on scores, the dropout probability and
    seed (None: no dropout), and whether the backward pass recomputes the blocks' weights."""

    scale: float
    softcap: float | None = None
    dropout: float = 0.0
    seed: Tensor | None = None
    recompute: bool = False


def attend(q_bhqd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, scope: Scope, kernel: Kernel) -> Tensor:
    """Attention, (b, h, q, d), blockwise over the queries if there are many."""
    count = q_bhqd.shape[2]
    if in_one_block(count, scope.causal):
        out = _weighted(weights(q_bhqd, k_bgkd, scope, kernel, 0), v_bgkd)
    elif count is not None and count <= QUERY_BLOCK * UNROLLED:
        out = _unrolled(q_bhqd, k_bgkd, v_bgkd, scope, kernel)
    else:
        out = _blockwise_loop(q_bhqd, k_bgkd, v_bgkd, scope, kernel)
    return fill_fully_masked(out, v_bgkd, scope)


def in_one_block(count: int | None, causal: bool) -> bool:
    """Whether `count` queries (None: dynamic) form one block; splitting a bidirectional sequence saves no
    computation."""
    return count is not None and count <= QUERY_BLOCK * (1 if causal else 2)


def fill_fully_masked(out_bhqd: Tensor, v_bgkd: Tensor, scope: Scope) -> Tensor:
    """Give fully masked queries equal weights on the keys that the spec selects, so that all kernels agree on padding
    too, which a loss over all positions of a row (question answering) includes."""
    if (masked := scope.fully_masked()) is None:
        return out_bhqd
    return tf.where(masked, repeat_groups(scope.mean(v_bgkd), out_bhqd.shape[1]), out_bhqd)


def _unrolled(q_bhqd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, scope: Scope, kernel: Kernel) -> Tensor:
    """The blocks, unrolled, each over the keys to which its queries may attend."""
    out, count, keys = [], q_bhqd.shape[2], size(k_bgkd, 2)
    for number, start in enumerate(range(0, count, QUERY_BLOCK)):
        stop, first, last = min(start + QUERY_BLOCK, count), 0, keys
        if scope.aligned:
            last = stop if scope.causal else keys
            first = 0 if scope.window is None else max(0, start - scope.window + 1)
        part = scope.block(start, stop - start, first, last - first)
        k, v = cut(k_bgkd, first, last - first, 2), cut(v_bgkd, first, last - first, 2)
        out.append(_block(q_bhqd[:, :, start:stop], k, v, part, kernel, number))
    return tf.concat(out, axis=2)


def _blockwise_loop(q_bhqd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, scope: Scope, kernel: Kernel) -> Tensor:
    """The blocks in a graph's loop; with a sliding window, each block reads the keys of its windows only."""
    count = size(q_bhqd, 2)
    blocks = -(-count // QUERY_BLOCK)
    after = blocks * QUERY_BLOCK - count
    q_bhqd = _padded(q_bhqd, 0, after, 2)
    scope = replace(
        scope,
        index_q=_padded(scope.index_q, 0, after, 0),
        segment_bq=_padded(scope.segment_bq, 0, after, 1),
    )
    keys = size(k_bgkd, 2)
    if windowed := scope.aligned and scope.window is not None:
        before, keys = (scope.window or 1) - 1, (scope.window or 1) - 1 + QUERY_BLOCK
        k_bgkd, v_bgkd = (_padded(x, before, after, 2) for x in (k_bgkd, v_bgkd))
        scope = replace(
            scope,
            index_k=_padded(scope.index_k, before, after, 0, value=-1),
            valid_bk=_padded(scope.valid_bk, before, after, 1, value=False),
            segment_bk=_padded(scope.segment_bk, before, after, 1),
        )

    def one(number: Tensor) -> Tensor:
        start = number * QUERY_BLOCK
        first = start if windowed else 0
        q = cut(q_bhqd, start, QUERY_BLOCK, 2)
        k, v = (k_bgkd, v_bgkd) if not windowed else (cut(x, first, keys, 2) for x in (k_bgkd, v_bgkd))
        return _block(q, k, v, scope.block(start, QUERY_BLOCK, first, keys), kernel, number)

    spec = tf.TensorSpec((q_bhqd.shape[0], q_bhqd.shape[1], QUERY_BLOCK, q_bhqd.shape[3]), q_bhqd.dtype)
    out = tf.map_fn(one, tf.range(blocks), fn_output_signature=spec, parallel_iterations=1)
    b, h, d = size(q_bhqd, 0), q_bhqd.shape[1], q_bhqd.shape[3]
    joined = tf.reshape(tf.transpose(out, (1, 2, 0, 3, 4)), (b, h, blocks * QUERY_BLOCK, d))
    return joined[:, :, :count]


def _padded(x: Tensor | None, before: Size, after: Size, axis: int, value: int | bool = 0) -> Tensor | None:
    if x is None:
        return None
    widths = [[before, after] if i == axis else [0, 0] for i in range(len(x.shape))]
    return tf.pad(x, widths, constant_values=tf.cast(value, x.dtype))


def _block(q: Tensor, k: Tensor, v: Tensor, scope: Scope, kernel: Kernel, number: Size) -> Tensor:
    """One block of queries. `recompute`: the backward pass recomputes it; inputs with a gradient must be arguments."""

    def run(q: Tensor, k: Tensor, v: Tensor, *table: Tensor) -> Tensor:
        block_scope = replace(scope, table=table[0]) if table else scope
        return _weighted(weights(q, k, block_scope, kernel, number), v)

    arguments = (q, k, v) if scope.table is None else (q, k, v, scope.table)
    called: Callable[..., Tensor] = tf.recompute_grad(run) if kernel.recompute else run
    return called(*arguments)


def attend_eager(
    q_bhqd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, scope: Scope, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """Attention with scores and softmax in fp32; the output and the weights (b, h, q, k) after dropout."""
    found = weights(q_bhqd, k_bgkd, scope, kernel, 0)
    if (masked := scope.fully_masked()) is not None:
        # Set explicitly, so that masked scores get no gradient.
        found = tf.where(masked, tf.cast(scope.equal_weights(), found.dtype), found)
    return _weighted(found, v_bgkd), found


def weights(q_bhqd: Tensor, k_bgkd: Tensor, scope: Scope, kernel: Kernel, number: Size) -> Tensor:
    """The attention weights (b, h, q, k) in the queries' dtype; keys are not repeated for the heads of a group."""
    b, h, q, d = size(q_bhqd, 0), q_bhqd.shape[1], size(q_bhqd, 2), q_bhqd.shape[3]
    g, k = k_bgkd.shape[1], size(k_bgkd, 2)
    exact = q_bhqd.dtype if q_bhqd.dtype == tf.float64 else tf.float32
    rows = tf.cast(tf.reshape(q_bhqd, (b, g, h // g * q, d)), exact) * kernel.scale
    scores = tf.reshape(tf.matmul(rows, tf.cast(k_bgkd, exact), transpose_b=True), (b, h, q, k))
    if kernel.softcap is not None:
        scores = kernel.softcap * tf.tanh(scores / kernel.softcap)
    if (bias := scope.bias()) is not None:
        scores = scores + tf.cast(bias, exact)
    if not scope.all_visible:
        scores = tf.where(scope.visible(), scores, LOWEST)
    found = tf.nn.softmax(scores, axis=-1)
    return tf.cast(dropped(found, kernel.dropout, kernel.seed, number), q_bhqd.dtype)


def _weighted(weights_bhqk: Tensor, v_bgkd: Tensor) -> Tensor:
    b, h, q, k = size(weights_bhqk, 0), weights_bhqk.shape[1], size(weights_bhqk, 2), size(weights_bhqk, 3)
    g, d = v_bgkd.shape[1], v_bgkd.shape[3]
    out = tf.matmul(tf.reshape(weights_bhqk, (b, g, h // g * q, k)), v_bgkd)
    return tf.reshape(out, (b, h, q, d))


def repeat_groups(x_bgkd: Tensor, heads: int) -> Tensor:
    """Keys or values of `g` groups repeated for `heads` heads; adjacent heads share a group."""
    groups = x_bgkd.shape[1]
    return x_bgkd if groups == heads else tf.repeat(x_bgkd, heads // groups, axis=1)
