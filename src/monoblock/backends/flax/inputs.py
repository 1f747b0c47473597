"""From a call's arrays to what the blocks need: places, positions, who sees whom. All of it can be traced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax

from monoblock.backends.flax.cache import Cache
from monoblock.backends.flax.model import Call
from monoblock.backends.flax.ops import Scope
from monoblock.positions import is_dynamic
from monoblock.spec import ArchSpec, Learned, Rotary


@dataclass(frozen=True)
class Wanted:
    """What a call asks for that decides which code is compiled.

    `fresh`: no token came before (keys and queries line up). `keep`: the logits of the last tokens only, 0 for all.
    `choices`: the rows of one example, as (batch, choices) of the outputs where `nested`.
    """

    train: bool = False
    attentions: bool = False
    hidden_states: bool = False
    fresh: bool = True
    keep: int = 0
    choices: int = 1
    nested: bool = False


AT_REST = Wanted()


def prepare(
    spec: ArchSpec, given: Mapping[str, Array], count: int, cache: Cache | None, wanted: Wanted
) -> Call:
    """The call for the blocks, of `count` tokens."""
    fresh = cache is None or wanted.fresh
    past = jnp.zeros((), jnp.int32) if cache is None or fresh else cache.length
    total = count if cache is None or fresh else cache.max_length
    if cache is not None and count > cache.max_length:
        raise ValueError(f"{count} tokens do not fit into a cache of {cache.max_length}: make it longer")
    index_k = jnp.arange(total, dtype=jnp.int32)
    index_q = index_k if fresh else past + jnp.arange(count, dtype=jnp.int32)
    mask, segments = given.get("attention_mask"), given.get("sequence_id")
    valid = None if mask is None else mask[:, :total] != 0
    key_positions = index_k[None] if valid is None else _counted(spec, valid)
    counted = key_positions if fresh else lax.dynamic_slice_in_dim(key_positions, past, count, axis=1)
    segment_bk = None if segments is None else segments[:, :total]
    segment_bq = segment_bk
    if segment_bk is not None and not fresh:
        segment_bq = lax.dynamic_slice_in_dim(segment_bk, past, count, axis=1)
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
        fresh=fresh,
        max_length=0 if cache is None else cache.max_length,
        attentions=wanted.attentions,
        train=wanted.train,
    )


def _counted(spec: ArchSpec, valid_bk: Array) -> Array:
    """(b, k), the position of each token: counted without padding; padding after them goes on from the row's first
    token, but for angles that go by a row's length."""
    counted = jnp.maximum(jnp.cumsum(valid_bk, axis=-1) - 1, 0)
    if is_dynamic(spec.position(Rotary)):
        return counted
    first_b = jnp.argmax(valid_bk, axis=-1)[:, None]
    later = jnp.maximum(jnp.arange(valid_bk.shape[1], dtype=jnp.int32) - first_b, 0)
    if (learned := spec.position(Learned)) is not None:
        later = jnp.minimum(later, learned.size - learned.offset - 1)
    return jnp.where(valid_bk, counted, later)


def _positions(spec: ArchSpec, given: Mapping[str, Array], counted_bs: Array) -> Array:
    """The position of each token that comes in: as given, else counted; an index of the table if there is one."""
    learned, ids = spec.position(Learned), given.get("input_ids")
    positions = given.get("position_ids")
    if positions is not None:
        return positions.reshape(-1, positions.shape[-1])
    if learned is None:
        return counted_bs
    if learned.pad_id is not None and ids is not None:
        real = ids != learned.pad_id
        return jnp.where(real, jnp.cumsum(real, axis=-1), 0) + learned.offset - 1
    return counted_bs + learned.offset
