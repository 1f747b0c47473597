"""Sizes of the modules of each role (`modules.py`), from the spec: matrices, tables, and norms with their widths.

Each framework builds its modules from these numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

from monoblock.heads import HeadSpec
from monoblock.spec import ArchSpec, Buckets, Learned, Norm

# Roles that some models lack.
OPTIONAL = frozenset(
    ("gate", "patch_embed", "pos_embed", "rel_bias", "embed_norm", "final_norm", "q_norm", "k_norm")
)


def matrix(role: str, spec: ArchSpec, head: HeadSpec | None = None) -> tuple[int, int, bool] | None:
    """(inputs, outputs, has bias) of the role's matrix; None if it is no matrix or the model lacks it."""
    att, mlp = spec.attention, spec.mlp
    q, kv = att.heads * att.head_dim, att.kv_heads * att.head_dim
    match role:
        case "qkv" | "qkv_by_head":
            return spec.width, q + 2 * kv, att.qkv_bias
        case "q":
            return spec.width, q, att.qkv_bias
        case "k" | "v":
            return spec.width, kv, att.qkv_bias
        case "out":
            return q, spec.width, att.out_bias
        case "up":
            return spec.width, mlp.width, mlp.bias
        case "gate" if mlp.gated:
            return spec.width, mlp.width, mlp.bias
        case "gate_up":
            return spec.width, 2 * mlp.width, mlp.bias
        case "down":
            return mlp.width, spec.width, mlp.bias
        case "patch_embed" if spec.patches:
            return spec.patches.size, spec.width, True
        case "head_dense":
            return spec.width, spec.width, True
        case "head_summary" if head and head.summary and head.summary.size is not None:
            return spec.width, head.summary.size, True
        case _:
            return None


def transposed(role: str, classes: Mapping[str, str]) -> bool:
    """Whether the role's matrix in the bare model is stored as (inputs, outputs), by its module's `classes`."""
    return classes.get("linear") == "Conv1D" and not role.startswith("head_")


def table(role: str, spec: ArchSpec) -> tuple[int, int] | None:
    """(rows, columns) of the role's table; None if it is no table or the model lacks it."""
    learned, buckets = spec.position(Learned), spec.position(Buckets)
    match role:
        case "embed":
            return spec.vocab, spec.width
        case "pos_embed" if learned:
            return learned.size, spec.width
        case "rel_bias" if buckets:
            return buckets.count, spec.attention.heads
        case _:
            return None


def norm(role: str, spec: ArchSpec, head: HeadSpec | None = None) -> tuple[Norm, int] | None:
    """The role's norm and its width; None if it is no norm or the model lacks it."""
    att = spec.attention
    if role in ("q_norm", "k_norm"):
        if att.qk_norm is None:
            return None
        heads = att.heads if role == "q_norm" else att.kv_heads
        return att.qk_norm.norm, att.head_dim * (1 if att.qk_norm.span == "head" else heads)
    found = {
        "embed_norm": spec.embed_norm,
        "norm1": spec.norm,
        "norm2": spec.norm,
        "final_norm": spec.final_norm,
        "head_norm": head and head.norm,
    }.get(role)
    return found and (found, spec.width)
