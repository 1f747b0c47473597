"""The attention kernels, which never build a heads x queries x keys array unless the weights are asked for.

Shape suffixes: b batch, q queries, k keys, h heads, g key/value heads (h / g heads share one), d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import tensorflow as tf

from monoblock.backends.tf.ops import LOWEST, Size, Tensor, cut, dropped, size
from monoblock.backends.tf.scope import Scope

# Queries of one block of the block-wise kernel, and how many blocks a graph writes out one by one, each with the keys
# up to its own end; longer texts, and those of open length, run in a loop.
QUERY_BLOCK = 256
UNROLLED = 16


@dataclass(frozen=True)
class Kernel:
    """What the kernels need to know of a layer: the factor on q·k, the cap on scores, the dropout and its seed (None:
    nothing drops), and whether the backward pass computes the blocks' weights again."""

    scale: float
    softcap: float | None = None
    dropout: float = 0.0
    seed: Tensor | None = None
    again: bool = False


def attend(q_bhqd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, scope: Scope, kernel: Kernel) -> Tensor:
    """Attention, (b, h, q, d), in blocks of queries where there are many."""
    count = q_bhqd.shape[2]
    if in_one_block(count, scope.causal):
        out = _weighted(weights(q_bhqd, k_bgkd, scope, kernel, 0), v_bgkd)
    elif count is not None and count <= QUERY_BLOCK * UNROLLED:
        out = _written_out(q_bhqd, k_bgkd, v_bgkd, scope, kernel)
    else:
        out = _looped(q_bhqd, k_bgkd, v_bgkd, scope, kernel)
    return fill_fully_masked(out, v_bgkd, scope)


def in_one_block(count: int | None, causal: bool) -> bool:
    """Whether so many queries (None: it is open) go at once. Halves of a bidirectional sequence are no less work
    than the whole."""
    return count is not None and count <= QUERY_BLOCK * (1 if causal else 2)


def fill_fully_masked(out_bhqd: Tensor, v_bgkd: Tensor, scope: Scope) -> Tensor:
    """Queries that see no key get equal weights on the keys that the spec says: kernels agree on padding too, which a
    loss over all positions of a row (a span's) takes in."""
    if (masked := scope.fully_masked()) is None:
        return out_bhqd
    return tf.where(masked, repeat_groups(scope.mean(v_bgkd), out_bhqd.shape[1]), out_bhqd)


def _written_out(q_bhqd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, scope: Scope, kernel: Kernel) -> Tensor:
    """The blocks one after the other, each over the keys that any of its queries may see."""
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


def _looped(q_bhqd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, scope: Scope, kernel: Kernel) -> Tensor:
    """The blocks in a loop that a graph holds once; a block of a windowed text takes the keys of its windows."""
    count = size(q_bhqd, 2)
    blocks = -(-count // QUERY_BLOCK)
    behind = blocks * QUERY_BLOCK - count
    q_bhqd = _padded(q_bhqd, 0, behind, 2)
    scope = replace(
        scope,
        index_q=_padded(scope.index_q, 0, behind, 0),
        segment_bq=_padded(scope.segment_bq, 0, behind, 1),
    )
    keys = size(k_bgkd, 2)
    if rolls := scope.aligned and scope.window is not None:
        before, keys = (scope.window or 1) - 1, (scope.window or 1) - 1 + QUERY_BLOCK
        k_bgkd, v_bgkd = (_padded(x, before, behind, 2) for x in (k_bgkd, v_bgkd))
        scope = replace(
            scope,
            index_k=_padded(scope.index_k, before, behind, 0, value=-1),
            valid_bk=_padded(scope.valid_bk, before, behind, 1, value=False),
            segment_bk=_padded(scope.segment_bk, before, behind, 1),
        )

    def one(number: Tensor) -> Tensor:
        start = number * QUERY_BLOCK
        first = start if rolls else 0
        q = cut(q_bhqd, start, QUERY_BLOCK, 2)
        k, v = (k_bgkd, v_bgkd) if not rolls else (cut(x, first, keys, 2) for x in (k_bgkd, v_bgkd))
        return _block(q, k, v, scope.block(start, QUERY_BLOCK, first, keys), kernel, number)

    spec = tf.TensorSpec((q_bhqd.shape[0], q_bhqd.shape[1], QUERY_BLOCK, q_bhqd.shape[3]), q_bhqd.dtype)
    out = tf.map_fn(one, tf.range(blocks), fn_output_signature=spec, parallel_iterations=1)
    b, h, d = size(q_bhqd, 0), q_bhqd.shape[1], q_bhqd.shape[3]
    joined = tf.reshape(tf.transpose(out, (1, 2, 0, 3, 4)), (b, h, blocks * QUERY_BLOCK, d))
    return joined[:, :, :count]


def _padded(x: Tensor | None, before: Size, behind: Size, axis: int, value: int | bool = 0) -> Tensor | None:
    if x is None:
        return None
    widths = [[before, behind] if i == axis else [0, 0] for i in range(len(x.shape))]
    return tf.pad(x, widths, constant_values=tf.cast(value, x.dtype))


def _block(q: Tensor, k: Tensor, v: Tensor, scope: Scope, kernel: Kernel, number: Size) -> Tensor:
    """One block. `again`: its weights are not kept for the backward pass; all that has a gradient is an argument."""

    def run(q: Tensor, k: Tensor, v: Tensor, *table: Tensor) -> Tensor:
        own = replace(scope, table=table[0]) if table else scope
        return _weighted(weights(q, k, own, kernel, number), v)

    arguments = (q, k, v) if scope.table is None else (q, k, v, scope.table)
    called: Callable[..., Tensor] = tf.recompute_grad(run) if kernel.again else run
    return called(*arguments)


def attend_eager(
    q_bhqd: Tensor, k_bgkd: Tensor, v_bgkd: Tensor, scope: Scope, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """Attention by its formula, scores and softmax in fp32; the output and the weights (b, h, q, k) after dropout."""
    found = weights(q_bhqd, k_bgkd, scope, kernel, 0)
    if (masked := scope.fully_masked()) is not None:
        # By name, so that masked scores get no gradient.
        found = tf.where(masked, tf.cast(scope.equal_weights(), found.dtype), found)
    return _weighted(found, v_bgkd), found


def weights(q_bhqd: Tensor, k_bgkd: Tensor, scope: Scope, kernel: Kernel, number: Size) -> Tensor:
    """The attention weights (b, h, q, k) in the queries' dtype; the heads of a group share its keys unrepeated."""
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
    """Keys or values of `g` groups as those of `heads` heads, neighbours sharing one."""
    groups = x_bgkd.shape[1]
    return x_bgkd if groups == heads else tf.repeat(x_bgkd, heads // groups, axis=1)
