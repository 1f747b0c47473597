"""What a model is, in numbers: the only thing that a backend knows about a family.

`config.to_spec()` turns the hub's field names, defaults and omissions into an `ArchSpec`, in which every
number is explicit and every variant is a type. Backends interpret the spec; they never see a config.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar

# What no model is near, and what nothing is computed or allocated for: a config may say anything.
MOST: dict[str, int] = {
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
    """A norm of queries and keys, over each head (`span="head"`) or over all heads at once (`"width"`)."""

    norm: Norm
    span: Literal["head", "width"]


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A table of `size` positions; the first token has position `offset`.

    `pad_id`: where token ids are given, positions count the tokens that are not this one, which has position
    `offset - 1` (MPNet); None: they count the tokens that the attention mask leaves.
    """

    size: int
    offset: int = 0
    pad_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies stretch beyond the trained length (`linear`, `dynamic`, `yarn`, `llama3`)."""

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
    """RoPE (arXiv:2104.09864), half-rotation form, on the first `dim` channels of each head."""

    dim: int
    theta: float
    scaling: RopeScaling | None = None


@dataclass(frozen=True, kw_only=True)
class Alibi:
    """ALiBi (arXiv:2108.12409): `slope_h * (k - q)` is added to the scores; see `slopes()`."""

    bias_max: float

    def slopes(self, heads: int) -> tuple[float, ...]:
        """`2 ** (-bias_max * i / n)`, i = 1..n, n the next power of two >= heads.

        When n is not `heads`, the odd-indexed slopes come first, then the even-indexed ones, cut to `heads`
        (the rule of MPT's makers; the paper's own differs).
        """
        n = 1 << max(heads - 1, 0).bit_length()
        slopes = [2.0 ** (-self.bias_max * i / n) for i in range(1, n + 1)]
        return tuple(slopes if n == heads else (slopes[1::2] + slopes[::2])[:heads])


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """T5's relative position buckets (arXiv:1910.10683), one table of `count` x heads shared by all layers."""

    count: int
    max_distance: int


Position = Learned | Rotary | Alibi | Buckets
P = TypeVar("P", Learned, Rotary, Alibi, Buckets)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Scores are `scale * q·k` (`softcap * tanh(s / softcap)` if capped) over `kv_heads` groups of heads.

    `clip`: queries, keys and values are clamped to [-clip, clip] as projected. `by_segment`: tokens see only
    tokens of their own segment (`sequence_id`). `masked_rows`: on which keys a query that sees none (padding) has equal
    weights, as adding up its masks leaves them: on all, on those behind it that are real or in its window, or on the
    real ones.
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
    masked_rows: Literal["all", "behind", "real"] = "all"


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """`down(act(up(x)))`, or `down(act(gate(x)) * up(x))` when gated."""

    width: int
    act: str
    gated: bool
    bias: bool


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Probabilities while training: on the embedding, the attention weights, and each sub-layer's output."""

    embed: float = 0.0
    attention: float = 0.0
    residual: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Patches:
    """Image patches of `size` numbers, projected into the places of the tokens `token_id` (Fuyu)."""

    size: int
    token_id: int


@dataclass(frozen=True, kw_only=True)
class ArchSpec:
    """A transformer, whole. `windows[i]` is how many keys layer i sees, the query's own included; None: all.

    `embed_gradient`: the share of the gradient that reaches the embedding.
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
        """The spec itself; a ValueError that lists every gap at once if it cannot be built."""
        if gaps := list(_gaps(self)):
            raise ValueError(f"{name} does not describe a model that can be built: " + "; ".join(gaps))
        return self

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _gaps(spec: ArchSpec) -> Iterator[str]:
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
        most = MOST.get(what, size)
        if not 1 <= size <= most:
            yield f"{what} must be at least 1{f' and at most {most:,}' if size > most else ''}, got {size}"
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
        yield f"the deviation of initial weights must be at least 0, got {spec.init_std}"
    if not 0 < spec.embed_gradient <= 1:
        yield f"embed_gradient must be in (0, 1], got {spec.embed_gradient}"
    for i, window in enumerate(spec.windows):
        if window is not None and window < 1:
            yield f"window of layer {i} must be at least 1 key, got {window}"
        if window is not None and not spec.causal:
            yield f"window of layer {i} needs causal=True: it has no meaning for keys ahead of the query"
    yield from _position_gaps(spec)


def _position_gaps(spec: ArchSpec) -> Iterator[str]:
    if len({type(p) for p in spec.positions}) != len(spec.positions):
        yield "each kind of position encoding may appear once"
    for position in spec.positions:
        match position:
            case Learned(size=size, offset=offset) if size <= offset:
                yield f"a position table of {size} leaves no room after its offset of {offset}"
            case Learned(pad_id=int(pad_id)) if not 0 <= pad_id < spec.vocab:
                yield f"positions that count from a padding id need one of the vocabulary, got {pad_id}"
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
    """The spec as indented text, a field a line; equal windows are folded."""
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
