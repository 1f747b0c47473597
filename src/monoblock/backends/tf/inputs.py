"""From a call's tensors to what the blocks need: places, positions, who sees whom. All of it can be traced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import tensorflow as tf

from monoblock.backends.tf.cache import Cache
from monoblock.backends.tf.model import Call
from monoblock.backends.tf.ops import Scope, Size, Tensor, after, size
from monoblock.positions import is_dynamic
from monoblock.spec import ArchSpec, Learned, Rotary


@dataclass(frozen=True)
class Wanted:
    """What a call asks for that decides which graph is made.

    `fresh`: no token came before (keys and queries line up). `keep`: the logits of the last tokens only, 0 for all.
    `choices`: the rows of one example, as (batch, choices) of the outputs where `nested`.
    """

    train: bool = False
    attentions: bool = False
    hidden_states: bool = False
    fresh: bool = True
    keep: int = 0
    choices: Size = 1
    nested: bool = False


AT_REST = Wanted()


def prepare(
    spec: ArchSpec, given: Mapping[str, Tensor], count: Size, cache: Cache | None, wanted: Wanted
) -> Call:
    """The call for the blocks, of `count` tokens."""
    fresh = cache is None or wanted.fresh
    past = tf.zeros((), tf.int32) if cache is None or fresh else cache.length
    total = _total(count, cache, fresh)
    index_k = tf.range(total)
    index_q = index_k if fresh else past + tf.range(count)
    mask, segments = given.get("attention_mask"), given.get("sequence_id")
    valid = None if mask is None else mask[:, :total] != 0
    key_positions = index_k[None] if valid is None else _counted(spec, valid)
    counted = key_positions if fresh else after(key_positions, past, count, 1)
    segment_bk = None if segments is None else segments[:, :total]
    segment_bq = segment_bk if fresh else after(segment_bk, past, count, 1)
    scope = Scope(
        index_q=index_q,
        index_k=index_k,
        causal=spec.causal,
        aligned=fresh,
        valid_bk=valid,
        segment_bq=segment_bq,
        segment_bk=segment_bk,
        masked_rows=spec.attention.masked_rows,
    )
    return Call(
        scope=scope,
        positions_bs=_positions(spec, given, counted),
        key_positions_bk=key_positions,
        head_mask=given.get("head_mask"),
        fresh=fresh,
        max_length=None if cache is None else cache.max_length,
        attentions=wanted.attentions,
        train=wanted.train,
    )


def _total(count: Size, cache: Cache | None, fresh: bool) -> Size:
    """How many places there are: those that come in, with those that a cache holds or has room for."""
    if cache is None or fresh:
        return count
    return size(cache.keys[0], 2) + count if cache.max_length is None else cache.max_length


def _counted(spec: ArchSpec, valid_bk: Tensor) -> Tensor:
    """The position of each token: counted without padding; padding after them goes on from the row's first token, but
    for angles that go by a row's length."""
    real = tf.cast(valid_bk, tf.int32)
    counted = tf.maximum(tf.cumsum(real, axis=-1) - 1, 0)
    if is_dynamic(spec.position(Rotary)):
        return counted
    first_b = tf.argmax(real, axis=-1, output_type=tf.int32)[:, None]
    later = tf.maximum(tf.range(size(valid_bk, 1)) - first_b, 0)
    if (learned := spec.position(Learned)) is not None:
        later = tf.minimum(later, learned.size - learned.offset - 1)
    return tf.where(valid_bk, counted, later)


def _positions(spec: ArchSpec, given: Mapping[str, Tensor], counted_bs: Tensor) -> Tensor:
    """The position of each token that comes in: as given, else counted; an index of the table if there is one."""
    learned, ids = spec.position(Learned), given.get("input_ids")
    positions = given.get("position_ids")
    if positions is not None:
        return tf.reshape(positions, (-1, size(positions, -1)))
    if learned is None:
        return counted_bs
    if learned.pad_id is not None and ids is not None:
        real = tf.cast(ids != learned.pad_id, tf.int32)
        return real * tf.cumsum(real, axis=-1) + learned.offset - 1
    return counted_bs + learned.offset
