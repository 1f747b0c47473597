"""The architecture spec: all that a backend knows about a family.

`config.to_spec()` converts transformers' fields and defaults to an `ArchSpec`, in which every value is explicit and
every variant is a type. Backends interpret the spec and never read a config.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar

# Limits far above any model, checked before anything is allocated, since a config may be malicious.
MAX_SIZES: dict[str, int] = {
    "vocab": 2**36,
    "width": 2**22,
    "heads": 2**16,
    "head_dim": 2**16,
    "mlp width": 2**30,
    "position table": 2**36,
    "patch size": 2**30,
}
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "silu")


@dataclass(frozen=True, kw_only=True)
class Norm:
    """Layer norm (`(x - mean) / sqrt(var + eps) * weight + bias`) or RMS norm (`x / sqrt(mean(x²) + eps) * weight`)."""

    kind: Literal["layer", "rms"]
    eps: float
    bias: bool


@dataclass(frozen=True, kw_only=True)
class QkNorm:
    """Normalisation of queries and keys, over each head (`span="head"`) or over all heads jointly (`"width"`)."""

    norm: Norm
    span: Literal["head", "width"]


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Learned absolute positions: a table of `size` rows; the first token has position `offset`.

    `pad_id`: if token ids are given, positions count tokens other than this one, whose own position is `offset - 1`
    (MPNet); None: positions count the unmasked tokens.
    """

    size: int
    offset: int = 0
    pad_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of RoPE frequencies for lengths beyond `original_length`; see `positions.inverse_frequencies`."""

    kind: Literal["linear", "dynamic", "yarn", "llama3"]
    factor: float
    original_length: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """RoPE (arXiv:2104.09864) with pairs dim / 2 apart (NeoX style), on the first `dim` channels of each head."""

    dim: int
    theta: float
    scaling: RopeScaling | None = None


@dataclass(frozen=True, kw_only=True)
class Alibi:
    """ALiBi (arXiv:2108.12409): `slope_h * (k - q)` is added to the scores; see `slopes()`."""

    bias_max: float

    def slopes(self, heads: int) -> tuple[float, ...]:
        """`2 ** (-bias_max * i / n)`, i = 1..n, n the next power of two >= heads.

        If n is not `heads`: the slopes of even i, then those of odd i, truncated to `heads` (llm-foundry's rule, which
        differs from the paper's).
        """
        n = 1 << max(heads - 1, 0).bit_length()
        slopes = [2.0 ** (-self.bias_max * i / n) for i in range(1, n + 1)]
        return tuple(slopes if n == heads else (slopes[1::2] + slopes[::2])[:heads])


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """T5's relative position buckets (arXiv:1910.10683): one (count, heads) table of biases, shared by all layers."""

    count: int
    max_distance: int


Position = Learned | Rotary | Alibi | Buckets
P = TypeVar("P", Learned, Rotary, Alibi, Buckets)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Scores are `scale * q·k` (with softcap: `softcap * tanh(s / softcap)`), with `kv_heads` key and value heads
    (GQA).

    `clip`: projected queries, keys and values are clamped to [-clip, clip]. `by_segment`: tokens attend only within
    their segment (`sequence_id`). `masked_rows`: the keys over which a fully masked query (padding) has uniform
    weights, as the sum of the original's additive masks gives: "all", "past" (keys not after the query that are valid
    or in its window), or "valid" (keys that are not padding).
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool
    out_bias: bool
    clip: float | None = None
    softcap: float | None = None
    qk_norm: QkNorm | None = None
    by_segment: bool = False
    masked_rows: Literal["all", "past", "valid"] = "all"


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """`down(act(up(x)))`, or `down(act(gate(x)) * up(x))` when gated."""

    width: int
    act: str
    gated: bool
    bias: bool


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Dropout probabilities in training: of the embedding, the attention weights, and each sub-layer's output."""

    embed: float = 0.0
    attention: float = 0.0
    residual: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Patches:
    """Image patches of `size` values, projected to embeddings that replace those of the tokens `token_id` (Fuyu)."""

    size: int
    token_id: int


@dataclass(frozen=True, kw_only=True)
class ArchSpec:
    """A transformer architecture. `windows[i]`: the number of keys visible in layer i, including the query's own; None:
    all.

    `placement`: norms before ("pre") or after ("post") the sub-layers. `embed_gradient`: the fraction of the gradient
    that reaches the embedding.
    """

    vocab: int
    width: int
    attention: Attention
    mlp: Mlp
    norm: Norm
    windows: tuple[int | None, ...]
    positions: tuple[Position, ...]
    placement: Literal["pre", "post"] = "pre"
    causal: bool = True
    embed_norm: Norm | None = None
    final_norm: Norm | None = None
    dropout: Dropout = Dropout()
    tie_head: bool = True
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    embed_gradient: float = 1.0
    patches: Patches | None = None
    init_std: float = 0.02

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return len(self.windows)

    def position(self, kind: type[P]) -> P | None:
        """The position encoding of that kind, or None."""
        for position in self.positions:  # torch.compile of PyTorch 2.7 cannot trace next() over a generator
            if isinstance(position, kind):
                return position
        return None

    def validate(self, name: str = "config") -> ArchSpec:
        """The spec itself; ValueError, listing all faults, if it is not valid."""
        if faults := list(_faults(self)):
            raise ValueError(f"{name} does not describe a valid model: " + "; ".join(faults))
        return self

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _faults(spec: ArchSpec) -> Iterator[str]:
    att, mlp = spec.attention, spec.mlp
    learned, patches = spec.position(Learned), spec.patches
    sizes = {
        "vocab": spec.vocab,
        "width": spec.width,
        "layers": spec.layers,
        "heads": att.heads,
        "kv_heads": att.kv_heads,
        "head_dim": att.head_dim,
        "mlp width": mlp.width,
        **({"position table": learned.size} if learned else {}),
        **({"patch size": patches.size} if patches else {}),
    }
    for what, size in sizes.items():
        limit = MAX_SIZES.get(what, size)
        if not 1 <= size <= limit:
            yield f"{what} must be at least 1{f' and at most {limit:,}' if size > limit else ''}, got {size}"
    if att.kv_heads > 0 and att.heads % att.kv_heads:
        yield f"heads ({att.heads}) must be a multiple of kv_heads ({att.kv_heads})"
    if mlp.act not in ACTIVATIONS:
        yield f"activation must be one of {', '.join(ACTIVATIONS)}, got {mlp.act!r}"
    positives = {
        "scale": att.scale,
        "clip": att.clip,
        "softcap": att.softcap,
        "logit_softcap": spec.logit_softcap,
    }
    for what, value in positives.items():
        if value is not None and not value > 0:
            yield f"{what} must be above 0, got {value}"
    norms = {
        "norm": spec.norm,
        "embed_norm": spec.embed_norm,
        "final_norm": spec.final_norm,
        "qk_norm": att.qk_norm and att.qk_norm.norm,
    }
    for what, norm in norms.items():
        if norm is not None and not norm.eps > 0:
            yield f"{what} eps must be above 0, got {norm.eps}"
        if norm is not None and norm.kind == "rms" and norm.bias:
            yield f"{what} is an RMS norm, which has no bias"
    for what, p in (
        ("embed", spec.dropout.embed),
        ("attention", spec.dropout.attention),
        ("residual", spec.dropout.residual),
    ):
        if not 0 <= p < 1:
            yield f"{what} dropout must be in [0, 1), got {p}"
    if not 0 <= spec.init_std <= 1e6:
        yield f"the standard deviation of initial weights must be at least 0, got {spec.init_std}"
    if not 0 < spec.embed_gradient <= 1:
        yield f"embed_gradient must be in (0, 1], got {spec.embed_gradient}"
    for i, window in enumerate(spec.windows):
        if window is not None and window < 1:
            yield f"window of layer {i} must be at least 1 key, got {window}"
        if window is not None and not spec.causal:
            yield f"window of layer {i} needs causal=True: windows are defined for past keys only"
    yield from _position_faults(spec)


def _position_faults(spec: ArchSpec) -> Iterator[str]:
    if len({type(p) for p in spec.positions}) != len(spec.positions):
        yield "each kind of position encoding may appear once"
    for position in spec.positions:
        match position:
            case Learned(size=size, offset=offset) if size <= offset:
                yield f"a position table of {size} rows has none left after its offset of {offset}"
            case Learned(pad_id=int(pad_id)) if not 0 <= pad_id < spec.vocab:
                yield f"the padding id of learned positions must be in the vocabulary, got {pad_id}"
            case Rotary(dim=dim) if dim < 2 or dim % 2 or dim > spec.attention.head_dim:
                yield f"rotary dim must be even and at most head_dim ({spec.attention.head_dim}), got {dim}"
            case Rotary(theta=theta) if not theta > 0:
                yield f"rotary theta must be above 0, got {theta}"
            case Rotary(scaling=RopeScaling() as scaling) if not (
                scaling.factor > 0 and scaling.original_length > 0
            ):
                yield (
                    f"rotary scaling needs a factor and an original length above 0, got {scaling.factor} and "
                    f"{scaling.original_length}"
                )
            case Rotary(dim=2, scaling=RopeScaling(kind="dynamic")):
                yield "dynamic rotary scaling needs a rotary dim above 2"
            case Rotary(scaling=RopeScaling(kind="llama3", low_freq_factor=low, high_freq_factor=high)) if (
                not low < high
            ):
                yield f"llama3 rotary scaling needs low_freq_factor below high_freq_factor, got {low} and {high}"
            case Rotary(theta=theta, scaling=RopeScaling(kind="yarn") as scaling) if not (
                theta > 1
                and min(scaling.beta_fast, scaling.beta_slow, scaling.attention_factor or 1) > 0
                and max(scaling.beta_fast, scaling.beta_slow) < 1e6
            ):
                yield (
                    "yarn rotary scaling needs a theta above 1, and beta_fast, beta_slow and attention_factor above 0, "
                    f"got {theta}, {scaling.beta_fast}, {scaling.beta_slow} and {scaling.attention_factor}"
                )
            case Alibi(bias_max=bias_max) if not bias_max > 0:
                yield f"alibi bias_max must be above 0, got {bias_max}"
            case Buckets(count=count, max_distance=distance) if (
                count < 4 or count % 2 or distance <= count // 4
            ):
                yield f"bucket count must be even, 4 or more, its max_distance over a quarter; got {count}, {distance}"
            case _:
                pass


def _lines(node: Any, indent: str = "") -> Iterator[str]:
    """The spec as indented text, one field per line; equal windows are shown once."""
    for field in fields(node):
        value = getattr(node, field.name)
        if field.name == "windows":
            same = len(set(value)) == 1
            yield f"{indent}layers: {len(value)}"
            yield f"{indent}windows: {value[0] or 'none' if same else value}"
        elif is_dataclass(value):
            yield f"{indent}{field.name}: {type(value).__name__}"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{field.name}: {value}"
