"""From the network's inputs to the blocks' inputs: indices, positions, components of the attention mask. Traceable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from monoblock.backends.xla.namespace import Array, Namespace, Size, is_static
from monoblock.positions import is_dynamic
from monoblock.spec import ArchSpec, Learned, Rotary


@dataclass(frozen=True)
class ForwardOptions:
    """Static options of a forward pass: another value compiles another program.

    `fresh`: no past tokens (queries and keys are the same tokens). `keep`: logits of the last `keep` tokens only, 0 for
    all. `choices`: rows per multiple-choice example; `nested`: outputs are (batch, choices, ...).
    """

    train: bool = False
    attentions: bool = False
    hidden_states: bool = False
    fresh: bool = True
    keep: int = 0
    choices: Size = 1
    nested: bool = False


DEFAULT_OPTIONS = ForwardOptions()


class Kinds(NamedTuple):
    """The classes, of a framework, that `prepare` instantiates."""

    context: Callable[..., Any]
    scope: Callable[..., Any]


def prepare(
    xp: Namespace,
    kinds: Kinds,
    spec: ArchSpec,
    given: Mapping[str, Array],
    count: Size,
    cache: Any,
    options: ForwardOptions,
) -> Any:
    """The context of a forward pass of `count` tokens: the attention mask, the positions of the new tokens (b, count)
    and of all keys (b, k), where a first axis of 1 stands for all rows, and the options."""
    fresh = cache is None or options.fresh
    past = 0 if cache is None or fresh else cache.length
    total = _total(xp, count, cache, fresh)
    index_k = xp.arange(total)
    mask, segments = given.get("attention_mask"), given.get("sequence_id")
    valid_bk = None if mask is None else mask[:, :total] != 0
    segment_bk = None if segments is None else segments[:, :total]
    key_positions_bk = index_k[None] if valid_bk is None else _counted(xp, spec, valid_bk)

    def of_queries(x_bk: Array | None) -> Array | None:
        return x_bk if fresh or x_bk is None else xp.columns(x_bk, past, count)

    scope = kinds.scope(
        index_q=index_k if fresh else past + xp.arange(count),
        index_k=index_k,
        causal=spec.causal,
        aligned=fresh,
        valid_bk=valid_bk,
        segment_bq=of_queries(segment_bk),
        segment_bk=segment_bk,
        masked_rows=spec.attention.masked_rows,
    )
    return kinds.context(
        scope=scope,
        positions_bs=_positions(xp, spec, given, of_queries(key_positions_bk)),
        key_positions_bk=key_positions_bk,
        fresh=fresh,
        max_length=None if cache is None else cache.max_length,
        attentions=options.attentions,
        train=options.train,
    )


def _total(xp: Namespace, count: Size, cache: Any, fresh: bool) -> Size:
    """The number of keys: those of the new tokens, and the cached ones or the capacity of the cache."""
    limit = None if cache is None else cache.max_length
    if limit is not None and is_static(count) and count > limit:
        raise ValueError(f"{count} tokens do not fit into a cache of {limit}: make it longer")
    if cache is None or fresh:
        return count
    return xp.size(cache.keys[0], 2) + count if limit is None else limit


def _counted(xp: Namespace, spec: ArchSpec, valid_bk: Array) -> Array:
    """(b, k): the position of each token, counted without padding. Padding after a row's first token counts on from
    there, except with dynamic RoPE scaling, which depends on the row's length."""
    counted = xp.maximum(xp.cumsum(xp.int32(valid_bk)) - 1, 0)
    if is_dynamic(spec.position(Rotary)):
        return counted
    later = xp.maximum(xp.arange(xp.size(valid_bk, 1)) - xp.first_true(valid_bk), 0)
    if (learned := spec.position(Learned)) is not None:
        later = xp.minimum(later, learned.size - learned.offset - 1)
    return xp.where(valid_bk, counted, later)


def _positions(xp: Namespace, spec: ArchSpec, given: Mapping[str, Array], counted_bs: Array) -> Array:
    """The position of each new token: as given, else counted; with learned positions, the row of the embedding."""
    learned, ids = spec.position(Learned), given.get("input_ids")
    positions = given.get("position_ids")
    if positions is not None:
        return xp.reshape(positions, (-1, xp.size(positions, -1)))
    if learned is None:
        return counted_bs
    if learned.pad_id is not None and ids is not None:
        real = xp.int32(ids != learned.pad_id)
        return real * xp.cumsum(real) + learned.offset - 1
    return counted_bs + learned.offset
