"""A call's arguments, checked and made the arrays that the network takes.

What is traced has a shape, which may be open, and no values: what is known of its shape is checked, its values are not.
Values are looked at only where that costs no transfer.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass, field
from typing import Any

from monoblock.backends.xla.documents import restarts
from monoblock.backends.xla.namespace import (
    Array,
    Namespace,
    Size,
    fits,
    is_floating,
    is_integer,
    known,
    shown,
)
from monoblock.backends.xla.patches import NAMES, patches
from monoblock.call_checks import Labels, check_mask, check_positions
from monoblock.field_types import brief
from monoblock.heads import CHOICE_INPUTS, KINDS, HeadSpec
from monoblock.positions import has_positions
from monoblock.spec import ArchSpec, Learned

log = logging.getLogger("monoblock")

CHOOSING = ("choice", "double")
LABELS = ("labels", "mc_labels", "start_positions", "end_positions", "num_items_in_batch")


@dataclass
class CheckedInputs:
    """What the network gets: arrays by name, whether the cache is empty, and the choices that the rows are of.
    `legacy`: the cache goes out as tuples."""

    given: dict[str, Any] = field(default_factory=dict[str, Any])
    fresh: bool = True
    choices: Size = 1
    nested: bool = False
    legacy: bool = False


def check_inputs(
    xp: Namespace,
    spec: ArchSpec,
    head: HeadSpec | None,
    arguments: dict[str, Any],
    cache: Any,
    *,
    train: bool,
    documents: bool,
) -> CheckedInputs:
    """The arguments, which are arrays, as the network takes them; ValueError says what is wrong.

    `documents`: position ids that begin anew within a row begin another document, which attends to itself alone.
    """
    given = {name: value for name, value in arguments.items() if name not in NAMES}
    made = CheckedInputs()
    if head is not None and head.kind in CHOOSING:
        given, made.choices, made.nested = _flattened(xp, given)
    batch, count = _tokens(xp, spec, given, made)
    seen = _seen(xp, spec, cache, batch, count)
    made.fresh = seen == 0
    total = None if seen is None or not known(count) else seen + count
    span = _Span(xp, batch, count, total, None if cache is None else cache.max_length)
    if (mask := given.get("attention_mask")) is not None:
        _mask(made, mask, span, needed=head is not None and KINDS[head.kind].pool == "last")
    if (segments := given.get("sequence_id")) is not None:
        if not spec.attention.by_segment:
            raise ValueError(
                "sequence_id would have no effect: the config does not set attn_uses_sequence_id=True"
            )
        made.given["sequence_id"] = xp.int32(span.of("sequence_id", segments))
    elif train and spec.attention.by_segment:
        raise ValueError(
            "the config sets attn_uses_sequence_id=True: training needs sequence_id (batch, tokens)"
        )
    _check_cache_position(xp, given.get("cache_position"), seen, count)
    _positions(spec, made, given.get("position_ids"), span)
    if "position_ids" in made.given:
        apart = documents and made.fresh and _separate(xp, spec, made, span)
        if not apart and not has_positions(spec):
            _warn_once("position_ids have no effect on a model that encodes positions as distances")
    if (types := given.get("token_type_ids")) is not None:
        made.given["token_type_ids"] = _ids(xp, spec, "token_type_ids", types, (batch, count))
    if (tokens := given.get("mc_token_ids")) is not None:
        made.given["mc_token_ids"] = _chosen_tokens(xp, tokens, batch, count)
    if (mask := given.get("head_mask")) is not None:
        made.given["head_mask"] = _head_mask(xp, spec, mask)
    if images := {name: arguments[name] for name in NAMES if name in arguments}:
        ids = made.given.get("input_ids")
        made.given |= patches(xp, spec.patches, images, ids, (batch, count))
    made.given |= {name: given[name] for name in LABELS if name in given}
    return made


def _tokens(xp: Namespace, spec: ArchSpec, given: dict[str, Any], made: CheckedInputs) -> tuple[Size, Size]:
    """Batch and tokens of the ids or embeddings."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if ids is not None and embeds is not None:
        raise ValueError(
            "You cannot specify both input_ids and inputs_embeds at the same time: give one of them"
        )
    if embeds is not None:
        if len(embeds.shape) != 3 or embeds.shape[2] != spec.width or not is_floating(embeds):
            raise ValueError(
                f"inputs_embeds must be (batch, tokens, {spec.width}), got {embeds.dtype.name} {tuple(embeds.shape)}"
            )
        made.given["inputs_embeds"] = tokens = embeds
    elif ids is not None:
        made.given["input_ids"] = tokens = _ids(xp, spec, "input_ids", ids, None)
    else:
        raise ValueError("You have to specify either input_ids or inputs_embeds")
    if known(tokens.shape[0]) and tokens.shape[0] == 0:
        raise ValueError("the input has no rows: give at least one sequence")
    if known(tokens.shape[1]) and tokens.shape[1] == 0:
        raise ValueError("the input has no tokens: give at least one (the bos token, for an empty string)")
    return xp.size(tokens, 0), xp.size(tokens, 1)


def _ids(xp: Namespace, spec: ArchSpec, name: str, ids: Array, shape: tuple[Size, Size] | None) -> Array:
    """Token ids as int32 (batch, tokens), of that shape if one is given."""
    empty = any(known(n) and n == 0 for n in ids.shape)  # lists without numbers have no type of their own
    if len(ids.shape) != 2 or not (empty or is_integer(ids)):
        raise ValueError(f"{name} must be integers (batch, tokens), got {ids.dtype.name} {tuple(ids.shape)}")
    if shape is not None and not fits(ids.shape, *shape):
        raise ValueError(f"{name} must be (batch, tokens) = {shown(*shape)}, got {tuple(ids.shape)}")
    if (values := xp.values(ids)) is not None and values.size:
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= spec.vocab:
            raise ValueError(
                f"{name} hold the token {low if low < 0 else high}, but the model's vocabulary has the ids "
                f"0 to {spec.vocab - 1}: is this the tokenizer of this model?"
            )
    return xp.int32(ids)


def _flattened(xp: Namespace, given: dict[str, Any]) -> tuple[dict[str, Any], Size, bool]:
    """Choices as rows: (batch, choices, tokens) becomes (batch * choices, tokens); what has rows already stays."""
    name, dims = ("input_ids", 3) if "inputs_embeds" not in given else ("inputs_embeds", 4)
    tokens = given.get(name)
    if tokens is None or len(tokens.shape) != dims:
        return given, 1, False
    flat = dict(given)
    for name in CHOICE_INPUTS:
        value = given.get(name)
        if value is not None and len(value.shape) == (4 if name == "inputs_embeds" else 3):
            rows, choices, *rest = (xp.size(value, axis) for axis in range(len(value.shape)))
            flat[name] = xp.reshape(value, (rows * choices if known(rows, choices) else -1, *rest))
    return flat, xp.size(tokens, 1), True


def _seen(xp: Namespace, spec: ArchSpec, cache: Any, batch: Size, count: Size) -> int | None:
    """How many tokens the cache holds (0 without one), None if that is traced; ValueError if it does not fit."""
    if cache is None:
        return 0
    if not spec.causal:
        raise ValueError("a bidirectional model has no cache: leave out past_key_values")
    if len(cache.keys) != spec.layers:
        raise ValueError(f"past_key_values must hold {spec.layers} layers, got {len(cache.keys)}")
    rows = cache.keys[0].shape[0]
    if known(batch, rows) and rows != batch:
        raise ValueError(f"past_key_values hold {rows} rows, and the input has {batch}")
    if cache.max_length is None:
        return cache.keys[0].shape[2]
    values = xp.values(cache.length, wait=True)
    seen = None if values is None else int(values)
    if known(count) and (seen or 0) + count > cache.max_length:
        raise ValueError(
            f"the cache holds {cache.max_length} tokens: {seen or 0} are in it and {count} more came; make it "
            "longer: init_cache(batch, max_length)"
        )
    return seen


@dataclass
class _Span:
    """The tokens of a call: `count` come in, `total` with those before (None: not known), `limit` fit the cache, if it
    has one."""

    xp: Namespace
    batch: Size
    count: Size
    total: int | None
    limit: int | None

    def of(self, name: str, x: Array) -> Array:
        """(batch, total), or with a cache (batch, limit), whose columns after the tokens may hold anything."""
        lengths = [n for n in (self.total, self.limit) if n is not None]
        if not any(fits(x.shape, self.batch, length) for length in lengths or [self.count]):
            ways = " or ".join(shown(self.batch, length) for length in dict.fromkeys(lengths or [self.count]))
            cached = "" if self.limit is None and self.total == self.count else ", the cached tokens included"
            raise ValueError(f"{name} must be (batch, tokens) = {ways}{cached}, got {tuple(x.shape)}")
        if self.limit is None or x.shape[1] == self.limit:
            return x
        return self.xp.pad(x, 0, self.limit - self.xp.size(x, 1))


def _mask(made: CheckedInputs, mask: Array, span: _Span, *, needed: bool) -> None:
    """The mask; left out where it is known to mask nothing, unless the head is to see it."""
    if (values := span.xp.values(mask)) is not None:
        check_mask(values)
    mask = span.of("attention_mask", span.xp.int32(mask != 0))
    values = None if needed or span.total is None else span.xp.values(mask)
    if values is None or not values[:, : span.total].all():
        made.given["attention_mask"] = mask


def _check_cache_position(xp: Namespace, positions: Array | None, seen: int | None, count: Size) -> None:
    """Positions must follow the cache; anything else would be written to one place and seen from another."""
    values = None if positions is None or seen is None else xp.values(positions)
    if values is not None and (
        values.shape != (count,) or values[0] != seen or values[-1] != seen + count - 1
    ):
        raise ValueError(
            f"cache_position must be {seen} to {(seen or 0) + count - 1}, the positions after {seen} cached tokens, "
            f"got {brief(values.tolist())}"
        )


def _positions(spec: ArchSpec, made: CheckedInputs, positions: Array, span: _Span) -> None:
    """Position ids, if any, as int32 (batch or 1, tokens); ValueError if the table of positions has no such row."""
    learned, xp = spec.position(Learned), span.xp
    if positions is not None:
        if len(positions.shape):
            positions = xp.reshape(positions, (-1, xp.size(positions, -1)))
        rows = any(fits(positions.shape, rows, span.count) for rows in (1, span.batch))
        if not (is_integer(positions) and rows):
            raise ValueError(
                f"position_ids must be integers {shown(span.batch, span.count)}, got {positions.dtype.name} "
                f"{tuple(positions.shape)}"
            )
        if (values := xp.values(positions)) is not None:
            check_positions(spec, int(values.min()), int(values.max()))
        made.given["position_ids"] = xp.int32(positions)
    if learned is None:
        return
    needed = _needed(learned, made.given, span)
    if needed is not None and needed > (room := learned.size - learned.offset):
        raise ValueError(
            f"the model has {room} learned positions, but the sequence, cache included, has {needed} tokens: shorten it"
        )


def _needed(learned: Learned, given: dict[str, Any], span: _Span) -> int | None:
    """How many rows of the position table the call reaches; None if that is traced."""
    ids, mask, xp = given.get("input_ids"), given.get("attention_mask"), span.xp
    if (positions := given.get("position_ids")) is not None:
        values = xp.values(positions)
        return None if values is None else int(values.max()) + 1 - learned.offset
    if learned.pad_id is not None and ids is not None:
        values = xp.values(ids)
        return None if values is None else int((values != learned.pad_id).sum(-1).max())
    if mask is None:
        return span.count if span.total is None and known(span.count) else span.total
    values = None if span.total is None else xp.values(mask)
    return None if values is None else int(values[:, : span.total].sum(-1).max())


def _separate(xp: Namespace, spec: ArchSpec, made: CheckedInputs, span: _Span) -> bool:
    """Whether rows may hold several documents, which positions that begin anew tell: they become segments beside those
    of sequence_id."""
    mask = made.given.get("attention_mask")
    # With an empty cache these are as long as it; the tokens come first.
    mask = None if mask is None else mask[:, : span.count]
    document = restarts(xp, spec, made.given["position_ids"], mask)
    if document is None:
        return False
    if (segments := made.given.get("sequence_id")) is not None:
        document = segments[:, : span.count] * span.count + document
    made.given["sequence_id"] = document
    return True


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def _chosen_tokens(xp: Namespace, tokens: Array, batch: Size, count: Size) -> Array:
    """The token that stands for each choice, (batch,)."""
    sized = not known(batch, *tokens.shape) or math.prod(tokens.shape) == batch
    if not (is_integer(tokens) and sized):
        raise ValueError(
            f"mc_token_ids must be an integer for each of the {shown(batch)[1:-1]} rows, got {tokens.dtype.name} "
            f"{tuple(tokens.shape)}"
        )
    values = xp.values(tokens)
    if values is not None and known(count) and not (values.min() >= 0 and values.max() < count):
        raise ValueError(
            f"mc_token_ids must be 0 to {count - 1}, positions of the {count} tokens, got {brief(values.tolist())}"
        )
    return xp.int32(xp.reshape(tokens, (-1,)))


def _head_mask(xp: Namespace, spec: ArchSpec, mask: Array) -> Array:
    """(layers, 1, h, 1, 1) from the hub's (heads,) or (layers, heads)."""
    heads = spec.attention.heads
    if tuple(mask.shape) not in ((heads,), (spec.layers, heads)):
        raise ValueError(
            f"head_mask must be ({heads},) or ({spec.layers}, {heads}), a factor for each head, got {tuple(mask.shape)}"
        )
    rows = xp.stacked([xp.reshape(mask, (-1, heads))] * (spec.layers if len(mask.shape) == 1 else 1))
    return xp.reshape(rows, (spec.layers, 1, heads, 1, 1))


def described(xp: Namespace, name: str, labels: Array) -> Labels:
    """Labels for the checks."""
    open_ = getattr(labels.shape, "rank", 0) is None  # a graph may not even know how many axes there are
    shape = (None,) if open_ else tuple(labels.shape)
    return Labels(name, shape, labels.dtype.name, xp.values(labels))


def dropouts(spec: ArchSpec, head: HeadSpec | None) -> list[float]:
    """Every probability of dropout in a model."""
    found = [spec.dropout.embed, spec.dropout.attention, spec.dropout.residual]
    if head is not None:
        found.append(head.dropout)
        if head.summary is not None:
            found += [head.summary.dropout_in, head.summary.dropout_out]
    return found
