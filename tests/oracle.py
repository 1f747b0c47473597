"""Reference implementation of every model in NumPy float64, against which the backends are tested.

Written from the papers and ArchSpec's documentation with explicit indices, for one row and one head at a time. It
shares no code with the backends. Parameters have canonical names.

Sources: ALiBi arXiv:2108.12409 with MPT's slopes (llm-foundry); RoPE arXiv:2104.09864, its scaling
arXiv:2306.15595 (linear), arXiv:2309.00071 (dynamic, yarn), Llama 3.1's code (llama3); buckets arXiv:1910.10683;
grouped-query attention arXiv:2305.13245; RMS norm arXiv:1910.07467; gated MLP arXiv:2002.05202.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from monoblock.spec import Alibi, ArchSpec, Buckets, Learned, Norm, RopeScaling, Rotary

Array = np.ndarray
Params = Mapping[str, Array]
IGNORED = -100


@dataclass
class Run:
    """hidden_states: the embedding and each block's output (layers + 1 of (batch, tokens, width)), the last one
    after the final norm. attentions: for each layer (batch, heads, tokens, tokens)."""

    hidden_states: list[Array]
    attentions: list[Array]

    @property
    def hidden(self) -> Array:
        return self.hidden_states[-1]


def run(
    spec: ArchSpec,
    params: Params,
    ids: Array | None = None,
    mask: Array | None = None,
    *,
    embeds: Array | None = None,
    segments: Array | None = None,
    position_ids: Array | None = None,
    token_types: Array | None = None,
    patches: Array | None = None,
) -> Run:
    """The backbone on whole sequences, without a cache. Outputs where `mask` is 0 are undefined.

    `position_ids` are RoPE positions or rows of the position table. `patches` (batch, n, size) replace the embeddings
    of the tokens with the patch id, in order.
    """
    table = np.asarray(params["embed.weight"], np.float64)
    x_bsw = table[ids] if embeds is None else np.asarray(embeds, np.float64)
    if patches is not None:
        x_bsw = _with_patches(spec, params, x_bsw.copy(), ids, patches)
    rows = []
    for b, x in enumerate(x_bsw):
        valid = np.ones(len(x), bool) if mask is None else np.asarray(mask[b]) != 0
        segment = np.zeros(len(x), int) if segments is None else np.asarray(segments[b])
        position = (
            counted(valid, spec) if position_ids is None else np.asarray(position_ids)[b % len(position_ids)]
        )
        if token_types is not None:
            x = x + table[np.asarray(token_types[b])]
        if learned := spec.position(Learned):
            index = position if position_ids is not None else position + learned.offset
            if learned.pad_id is not None and ids is not None and position_ids is None:
                real = np.asarray(ids[b]) != learned.pad_id
                index = np.where(real, np.cumsum(real), 0) + learned.offset - 1
            x = x + params["pos_embed.weight"][index]
        rows.append(
            _blocks(spec, params, norm(x, spec.embed_norm, params, "embed_norm"), valid, segment, position)
        )
    return Run(
        [np.stack([states[i] for states, _ in rows]) for i in range(spec.layers + 1)],
        [np.stack([weights[i] for _, weights in rows]) for i in range(spec.layers)],
    )


def _with_patches(spec: ArchSpec, params: Params, x_bsw: Array, ids: Array, patches: Array) -> Array:
    for b, row in enumerate(ids):
        for i, position in enumerate(np.flatnonzero(np.asarray(row) == spec.patches.token_id)):
            x_bsw[b, position] = linear(patches[b, i], params, "patch_embed")
    return x_bsw


def _blocks(
    spec: ArchSpec, params: Params, x: Array, valid: Array, segment: Array, position: Array
) -> tuple[list[Array], list[Array]]:
    states, attentions = [x], []
    for i in range(spec.layers):
        mask = visible(valid, segment, spec.causal, spec.windows[i])
        x, weights = block(spec, params, f"blocks.{i}", x, fill_fully_masked(spec, mask, valid, i), position)
        states.append(x)
        attentions.append(weights)
    states[-1] = norm(x, spec.final_norm, params, "final_norm")
    return states, attentions


def counted(valid: Array, spec: ArchSpec) -> Array:
    """Positions count the tokens that are not padding, from 0. Padding after the first token gets the distance from it,
    clamped to the table; with dynamic RoPE, where the length changes the angles, the preceding position."""
    positions = np.maximum(np.cumsum(valid) - 1, 0)
    rotary, learned = spec.position(Rotary), spec.position(Learned)
    if rotary is not None and rotary.scaling is not None and rotary.scaling.kind == "dynamic":
        return positions
    last = learned.size - learned.offset - 1 if learned else len(valid)
    first = int(np.argmax(valid))
    for i in range(first, len(valid)):
        if not valid[i]:
            positions[i] = min(i - first, last)
    return positions


def visible(valid: Array, segment: Array, causal: bool, window: int | None) -> Array:
    """`valid_k & (k <= q or not causal) & (q - k < window)`, within one segment; (queries, keys)."""
    n = len(valid)
    mask = np.zeros((n, n), bool)
    for q in range(n):
        k = np.arange(n)
        near = np.ones(n, bool) if window is None else q - k < window
        mask[q] = valid & ((k <= q) | (not causal)) & near & (segment == segment[q])
    return mask


def fill_fully_masked(spec: ArchSpec, mask: Array, valid: Array, layer: int) -> Array:
    """The mask with `spec.attention.masked_rows` applied: fully masked queries (padding) attend with equal scores to
    keys encoded as -1."""
    out, n = mask.astype(int), len(mask)
    for q in range(n):
        if mask[q].any():
            continue
        window = spec.windows[layer] or n
        chosen = {
            "all": lambda k: True,
            "valid": lambda k: valid[k] or not valid.any(),
            "past": lambda k, q=q, window=window: k <= q and (valid[k] or q - k < window),
        }[spec.attention.masked_rows]
        out[q] = [-1 if chosen(k) else 0 for k in range(n)]
    return out


def block(
    spec: ArchSpec, params: Params, name: str, x: Array, mask: Array, position: Array
) -> tuple[Array, Array]:
    """A transformer block on one row (tokens, width), and its attention weights."""
    if spec.placement == "pre":
        y, weights = attention(
            spec, params, f"{name}.attn", norm(x, spec.norm, params, f"{name}.norm1"), mask, position
        )
        x = x + y
        return x + mlp(spec, params, f"{name}.mlp", norm(x, spec.norm, params, f"{name}.norm2")), weights
    y, weights = attention(spec, params, f"{name}.attn", x, mask, position)
    x = norm(x + y, spec.norm, params, f"{name}.norm1")
    return norm(x + mlp(spec, params, f"{name}.mlp", x), spec.norm, params, f"{name}.norm2"), weights


def attention(
    spec: ArchSpec, params: Params, name: str, x: Array, mask: Array, position: Array
) -> tuple[Array, Array]:
    att, n = spec.attention, len(x)
    qkv = linear(x, params, f"{name}.qkv")
    if att.clip is not None:
        qkv = np.clip(qkv, -att.clip, att.clip)
    q_end = att.heads * att.head_dim
    k_end = q_end + att.kv_heads * att.head_dim
    q, k, v = qkv[:, :q_end], qkv[:, q_end:k_end], qkv[:, k_end:]
    if att.qk_norm is not None and att.qk_norm.span == "width":
        q = norm(q, att.qk_norm.norm, params, f"{name}.q_norm")
        k = norm(k, att.qk_norm.norm, params, f"{name}.k_norm")
    out, weights = np.zeros((n, q_end)), np.zeros((att.heads, n, n))
    for h in range(att.heads):
        own = slice(h * att.head_dim, (h + 1) * att.head_dim)
        g = h // (att.heads // att.kv_heads)
        shared = slice(g * att.head_dim, (g + 1) * att.head_dim)
        qh, kh, vh = q[:, own], k[:, shared], v[:, shared]
        if att.qk_norm is not None and att.qk_norm.span == "head":
            qh = norm(qh, att.qk_norm.norm, params, f"{name}.q_norm")
            kh = norm(kh, att.qk_norm.norm, params, f"{name}.k_norm")
        if rotary := spec.position(Rotary):
            qh, kh = apply_rope(qh, position, rotary), apply_rope(kh, position, rotary)
        scores = att.scale * (qh @ kh.T)
        if att.softcap is not None:
            scores = att.softcap * np.tanh(scores / att.softcap)
        weights[h] = softmax(scores + position_bias(spec, params, h, n), mask)
        out[:, own] = weights[h] @ vh
    return linear(out, params, f"{name}.out"), weights


def position_bias(spec: ArchSpec, params: Params, head: int, n: int) -> Array:
    """The bias of ALiBi and of relative buckets on the scores of a head, (queries, keys)."""
    distance = np.arange(n)[None, :] - np.arange(n)[:, None]  # k - q
    bias = np.zeros((n, n))
    if alibi := spec.position(Alibi):
        bias += slope(head, spec.attention.heads, alibi.bias_max) * distance
    if buckets := spec.position(Buckets):
        bias += params["rel_bias.weight"][
            np.vectorize(bucket)(distance, buckets.count, buckets.max_distance), head
        ]
    return bias


def slope(head: int, heads: int, bias_max: float) -> float:
    """ALiBi's slope of a head: 2 ** (-bias_max * i / n), with i = 1, 2, .. n for n = 2^m heads; otherwise n is the next
    power of two, with i = 2, 4, .. n, then 1, 3, .. for the remaining heads."""
    n = 1
    while n < heads:
        n *= 2
    order = list(range(1, n + 1)) if n == heads else [*range(2, n + 1, 2), *range(1, n + 1, 2)]
    return 2.0 ** (-bias_max * order[head] / n)


def bucket(distance: int, count: int, max_distance: int) -> int:
    """T5's bidirectional bucket: half of the buckets for keys up to the query, half for later keys."""
    half, near = count // 2, count // 4
    first = half if distance > 0 else 0
    away = abs(distance)
    if away < near:
        return first + away
    far = near + int(math.log(away / near) / math.log(max_distance / near) * (half - near))
    return first + min(far, half - 1)


def apply_rope(x: Array, position: Array, rotary: Rotary) -> Array:
    """RoPE, rotate-half: channel c pairs with c + dim / 2; channels from `dim` on are unchanged."""
    half, out = rotary.dim // 2, x.copy()
    frequencies, factor = rope_frequencies(rotary, int(position.max()) + 1)
    for c in range(half):
        cos, sin = np.cos(position * frequencies[c]) * factor, np.sin(position * frequencies[c]) * factor
        a, b = x[:, c], x[:, c + half]
        out[:, c], out[:, c + half] = a * cos - b * sin, b * cos + a * sin
    return out


def rope_frequencies(rotary: Rotary, length: int) -> tuple[list[float], float]:
    """Radians per token of each channel pair for a sequence of `length` tokens, and the factor on cos and sin."""
    plain = [rotary.theta ** (-2 * c / rotary.dim) for c in range(rotary.dim // 2)]
    s = rotary.scaling
    if s is None:
        return plain, 1.0
    if s.kind == "linear":
        return [f / s.factor for f in plain], 1.0
    if s.kind == "dynamic":
        length = max(length, s.original_length)
        grown = s.factor * length / s.original_length - (s.factor - 1)
        theta = rotary.theta * grown ** (rotary.dim / (rotary.dim - 2))
        return [theta ** (-2 * c / rotary.dim) for c in range(rotary.dim // 2)], 1.0
    if s.kind == "llama3":
        return [_llama3(f, s) for f in plain], 1.0
    factor = s.attention_factor
    if factor is None:
        factor = 0.1 * math.log(s.factor) + 1 if s.factor > 1 else 1.0
    return [_yarn(f, c, rotary, s) for c, f in enumerate(plain)], factor


def _llama3(frequency: float, s: RopeScaling) -> float:
    wave = 2 * math.pi / frequency
    if wave < s.original_length / s.high_freq_factor:
        return frequency
    if wave > s.original_length / s.low_freq_factor:
        return frequency / s.factor
    smooth = (s.original_length / wave - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    return (1 - smooth) * frequency / s.factor + smooth * frequency


def _yarn(frequency: float, c: int, rotary: Rotary, s: RopeScaling) -> float:
    def channel(rotations: float) -> float:
        """The channel with that many rotations within the original length."""
        return (
            rotary.dim
            * math.log(s.original_length / (rotations * 2 * math.pi))
            / (2 * math.log(rotary.theta))
        )

    low = max(math.floor(channel(s.beta_fast)), 0)
    high = min(math.ceil(channel(s.beta_slow)), rotary.dim - 1)
    ramp = min(max((c - low) / max(high - low, 0.001), 0.0), 1.0)  # 0: unscaled, 1: interpolated
    return frequency * (1 - ramp) + frequency / s.factor * ramp


def softmax(scores: Array, mask: Array) -> Array:
    """Softmax over the keys whose mask is not 0; keys with -1 have equal scores."""
    out = np.zeros_like(scores)
    for q in range(len(scores)):
        at = mask[q] != 0
        own = np.where(mask[q] < 0, 0.0, scores[q])[at]
        e = np.exp(own - own.max())
        out[q, at] = e / e.sum()
    return out


def mlp(spec: ArchSpec, params: Params, name: str, x: Array) -> Array:
    act = ACTIVATIONS[spec.mlp.act]
    if spec.mlp.gated:
        both = linear(x, params, f"{name}.gate_up")
        inner = act(both[:, : spec.mlp.width]) * both[:, spec.mlp.width :]
    else:
        inner = act(linear(x, params, f"{name}.up"))
    return linear(inner, params, f"{name}.down")


ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def linear(x: Array, params: Params, name: str) -> Array:
    y = x @ np.asarray(params[f"{name}.weight"], np.float64).T
    return y + params[f"{name}.bias"] if f"{name}.bias" in params else y


def norm(x: Array, kind: Norm | None, params: Params, name: str) -> Array:
    if kind is None:
        return x
    if kind.kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + kind.eps) * params[f"{name}.weight"]
    return x + params[f"{name}.bias"] if kind.bias else x


# ---------------------------------------------------------------------------- heads and losses


def logits(spec: ArchSpec, params: Params, hidden: Array, kind: str) -> Array:
    """Outputs of a head for hidden states (.., width); logits of a language model are scaled, then soft-capped."""
    tied = kind == "causal" and spec.tie_head
    y = linear(hidden, {**params, "head.out.weight": params["embed.weight"]} if tied else params, "head.out")
    if kind == "causal":
        y = y * spec.logit_scale
        if spec.logit_softcap is not None:
            y = spec.logit_softcap * np.tanh(y / spec.logit_softcap)
    return y


def pooled(
    hidden: Array, ids: Array | None, mask: Array | None, pad_id: int | None, by: str = "pad_id"
) -> Array:
    """The hidden state of each row's last token: with `by="pad_id"`, the rightmost one within the mask that is not the
    pad token, if there is one; otherwise the rightmost one within the mask."""
    picked = []
    for b, row in enumerate(hidden):
        valid = [i for i in range(len(row)) if mask is None or mask[b][i]]
        tokens = [i for i in valid if ids is None or pad_id is None or ids[b][i] != pad_id]
        if mask is None:
            last = tokens[-1:] or [0]
        else:
            last = (tokens if by == "pad_id" else valid)[-1:] or valid[-1:] or [0]
        picked.append(row[last[0]])
    return np.stack(picked)


def cross_entropy(scores: Array, labels: Array, count: float | None = None) -> float:
    """-log of the label's probability, summed over the labels that are not -100, divided by their number or `count`."""
    scores, labels = scores.reshape(-1, scores.shape[-1]), np.asarray(labels).reshape(-1)
    losses = []
    for row, label in zip(scores, labels, strict=True):
        if label != IGNORED:
            top = row.max()
            losses.append(top + math.log(np.exp(row - top).sum()) - row[label])
    return sum(losses) / (max(len(losses), 1) if count is None else count)


def causal_loss(scores: Array, labels: Array, count: float | None = None) -> float:
    """Logits of token t against label t + 1."""
    return cross_entropy(scores[:, :-1], np.asarray(labels)[:, 1:], count)


def sequence_loss(scores: Array, labels: Array, problem: str, count: float | None = None) -> float:
    """Mean over rows of the cross-entropy, or of the squared error or binary cross-entropy averaged over the labels."""
    if problem == "single_label_classification":
        return cross_entropy(scores, labels, count)
    labels = np.asarray(labels, np.float64).reshape(scores.shape)
    if problem == "regression":
        each = (scores - labels) ** 2
    else:
        each = np.log1p(np.exp(-np.abs(scores))) + np.maximum(scores, 0) - scores * labels
    return float(each.mean(-1).sum() / (len(scores) if count is None else count))


def span_loss(start: Array, end: Array, starts: Array, ends: Array, count: float | None = None) -> float:
    """The mean of both cross-entropies over the tokens; positions outside the sequence are ignored."""
    total = 0.0
    for scores, labels in ((start, starts), (end, ends)):
        labels = np.asarray(labels).reshape(-1)
        inside = (labels >= 0) & (labels < scores.shape[1])
        total += cross_entropy(scores, np.where(inside, labels, IGNORED), count)
    return total / 2
