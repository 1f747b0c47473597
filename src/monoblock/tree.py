"""The canonical parameter tree: names and shapes of a model's parameters, identical in every framework."""

from __future__ import annotations

from collections.abc import Iterator

from monoblock.heads import KINDS, HeadSpec
from monoblock.spec import ArchSpec, Buckets, Learned, Norm

Shape = tuple[int, ...]


def parameters(spec: ArchSpec, head: HeadSpec | None = None) -> dict[str, Shape]:
    """Canonical name -> shape, in the order of the forward pass; matrices are (outputs, inputs).

    A tied head's matrix is not listed; see `tied()`.
    """
    return dict([*_backbone(spec), *(_head(spec, head) if head else ())])


def _head(spec: ArchSpec, head: HeadSpec) -> Iterator[tuple[str, Shape]]:
    kind, size = KINDS[head.kind], head.size(spec.vocab)
    if kind.dense:
        yield from _linear("head.dense", spec.width, spec.width, True)
    yield from _norm("head.norm", head.norm, spec.width)
    if size is not None:
        if not tied(spec, head):
            yield "head.out.weight", (size, spec.width)
        if kind.bias:
            yield "head.out.bias", (size,)
    if head.summary and head.summary.size is not None:
        yield from _linear("head.summary", head.summary.size, spec.width, True)


def tied(spec: ArchSpec, head: HeadSpec | None) -> dict[str, str]:
    """Tied parameters: canonical name -> the parameter whose tensor it shares."""
    if head is not None and KINDS[head.kind].size == "vocab" and spec.tie_head:
        return {"head.out.weight": "embed.weight"}
    return {}


def _backbone(spec: ArchSpec) -> Iterator[tuple[str, Shape]]:
    yield "embed.weight", (spec.vocab, spec.width)
    if learned := spec.position(Learned):
        yield "pos_embed.weight", (learned.size, spec.width)
    if buckets := spec.position(Buckets):
        yield "rel_bias.weight", (buckets.count, spec.attention.heads)
    if spec.patches:
        yield from _linear("patch_embed", spec.width, spec.patches.size, True)
    yield from _norm("embed_norm", spec.embed_norm, spec.width)
    for i in range(spec.layers):
        yield from _block(f"blocks.{i}", spec)
    yield from _norm("final_norm", spec.final_norm, spec.width)


def _block(name: str, spec: ArchSpec) -> Iterator[tuple[str, Shape]]:
    att, mlp = spec.attention, spec.mlp
    q, kv = att.heads * att.head_dim, att.kv_heads * att.head_dim
    yield from _norm(f"{name}.norm1", spec.norm, spec.width)
    yield from _linear(f"{name}.attn.qkv", q + 2 * kv, spec.width, att.qkv_bias)
    if att.qk_norm:
        by_head = att.qk_norm.span == "head"
        yield from _norm(f"{name}.attn.q_norm", att.qk_norm.norm, att.head_dim if by_head else q)
        yield from _norm(f"{name}.attn.k_norm", att.qk_norm.norm, att.head_dim if by_head else kv)
    yield from _linear(f"{name}.attn.out", spec.width, q, att.out_bias)
    yield from _norm(f"{name}.norm2", spec.norm, spec.width)
    up, rows = ("gate_up", 2 * mlp.width) if mlp.gated else ("up", mlp.width)
    yield from _linear(f"{name}.mlp.{up}", rows, spec.width, mlp.bias)
    yield from _linear(f"{name}.mlp.down", spec.width, mlp.width, mlp.bias)


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _norm(name: str, norm: Norm | None, width: int) -> Iterator[tuple[str, Shape]]:
    if norm is not None:
        yield f"{name}.weight", (width,)
        if norm.bias:
            yield f"{name}.bias", (width,)
