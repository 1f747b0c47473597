"""Validation of a forward pass's arguments, and their conversion into the network's inputs.

Traced arrays have no values and may have dynamic axes: only the static part of their shape is checked. Values are
checked only where reading them needs no device transfer.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass, field
from typing import Any

from monoblock.backends.xla.documents import document_ids
from monoblock.backends.xla.namespace import (
    Array,
    Namespace,
    Size,
    is_floating,
    is_integer,
    is_static,
    shape_text,
    shapes_match,
)
from monoblock.backends.xla.patches import NAMES, patches
from monoblock.call_checks import Labels, check_mask, check_positions
from monoblock.field_types import brief
from monoblock.heads import CHOICE_INPUTS, KINDS, HeadSpec
from monoblock.positions import has_positions
from monoblock.spec import ArchSpec, Learned

log = logging.getLogger("monoblock")

MULTIPLE_CHOICE_KINDS = ("choice", "double")
LABELS = ("labels", "mc_labels", "start_positions", "end_positions", "num_items_in_batch")


@dataclass
class CheckedInputs:
    """Inputs of the network: arrays by name (`given`), whether no past token is cached (`fresh`), and the number of
    `choices` per example; `nested`: outputs are (batch, choices, ...). `legacy`: the cache is returned as tuples."""

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
    """Check arguments, which are arrays; ValueError if one does not fit.

    `documents`: position ids that restart within a row begin another document, which attends to itself alone.
    """
    given = {name: value for name, value in arguments.items() if name not in NAMES}
    result = CheckedInputs()
    if head is not None and head.kind in MULTIPLE_CHOICE_KINDS:
        given, result.choices, result.nested = _flatten_choices(xp, given)
    batch, count = _check_tokens(xp, spec, given, result)
    past = _past_length(xp, spec, cache, batch, count)
    result.fresh = past == 0
    total = None if past is None or not is_static(count) else past + count
    span = _TokenRange(xp, batch, count, total, None if cache is None else cache.max_length)
    if (mask := given.get("attention_mask")) is not None:
        _check_attention_mask(result, mask, span, needed=head is not None and KINDS[head.kind].pool == "last")
    if (segments := given.get("sequence_id")) is not None:
        if not spec.attention.by_segment:
            raise ValueError(
                "sequence_id would have no effect: the config does not set attn_uses_sequence_id=True"
            )
        result.given["sequence_id"] = xp.int32(span.pad_columns("sequence_id", segments))
    elif train and spec.attention.by_segment:
        raise ValueError(
            "the config sets attn_uses_sequence_id=True: training needs sequence_id (batch, tokens)"
        )
    _check_cache_position(xp, given.get("cache_position"), past, count)
    _check_position_ids(spec, result, given.get("position_ids"), span)
    if "position_ids" in result.given:
        separated = documents and result.fresh and _separate_documents(xp, spec, result, span)
        if not separated and not has_positions(spec):
            _warn_once("position_ids have no effect on a model that encodes positions as distances")
    if (types := given.get("token_type_ids")) is not None:
        result.given["token_type_ids"] = _ids(xp, spec, "token_type_ids", types, (batch, count))
    if (tokens := given.get("mc_token_ids")) is not None:
        result.given["mc_token_ids"] = _check_mc_token_ids(xp, tokens, batch, count)
    if (mask := given.get("head_mask")) is not None:
        result.given["head_mask"] = _expand_head_mask(xp, spec, mask)
    if images := {name: arguments[name] for name in NAMES if name in arguments}:
        ids = result.given.get("input_ids")
        result.given |= patches(xp, spec.patches, images, ids, (batch, count))
    result.given |= {name: given[name] for name in LABELS if name in given}
    return result


def _check_tokens(
    xp: Namespace, spec: ArchSpec, given: dict[str, Any], result: CheckedInputs
) -> tuple[Size, Size]:
    """The batch size and the number of tokens of the ids or embeddings."""
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
        result.given["inputs_embeds"] = tokens = embeds
    elif ids is not None:
        result.given["input_ids"] = tokens = _ids(xp, spec, "input_ids", ids, None)
    else:
        raise ValueError("You have to specify either input_ids or inputs_embeds")
    if is_static(tokens.shape[0]) and tokens.shape[0] == 0:
        raise ValueError("the input has no rows: give at least one sequence")
    if is_static(tokens.shape[1]) and tokens.shape[1] == 0:
        raise ValueError("the input has no tokens: give at least one (the bos token, for an empty string)")
    return xp.size(tokens, 0), xp.size(tokens, 1)


def _ids(xp: Namespace, spec: ArchSpec, name: str, ids: Array, shape: tuple[Size, Size] | None) -> Array:
    """Token ids as int32 (batch, tokens); `shape`: the expected one."""
    empty = any(is_static(n) and n == 0 for n in ids.shape)  # empty lists have no integer dtype
    if len(ids.shape) != 2 or not (empty or is_integer(ids)):
        raise ValueError(f"{name} must be integers (batch, tokens), got {ids.dtype.name} {tuple(ids.shape)}")
    if shape is not None and not shapes_match(ids.shape, *shape):
        raise ValueError(f"{name} must be (batch, tokens) = {shape_text(*shape)}, got {tuple(ids.shape)}")
    if (values := xp.values(ids)) is not None and values.size:
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= spec.vocab:
            raise ValueError(
                f"{name} hold the token {low if low < 0 else high}, but the model's vocabulary has the ids "
                f"0 to {spec.vocab - 1}: is this the tokenizer of this model?"
            )
    return xp.int32(ids)


def _flatten_choices(xp: Namespace, given: dict[str, Any]) -> tuple[dict[str, Any], Size, bool]:
    """Flatten (batch, choices, tokens) into (batch * choices, tokens); flat inputs stay. The inputs, the choices per
    example, and whether they were nested."""
    name, dims = ("input_ids", 3) if "inputs_embeds" not in given else ("inputs_embeds", 4)
    tokens = given.get(name)
    if tokens is None or len(tokens.shape) != dims:
        return given, 1, False
    flat = dict(given)
    for name in CHOICE_INPUTS:
        value = given.get(name)
        if value is not None and len(value.shape) == (4 if name == "inputs_embeds" else 3):
            rows, choices, *rest = (xp.size(value, axis) for axis in range(len(value.shape)))
            flat[name] = xp.reshape(value, (rows * choices if is_static(rows, choices) else -1, *rest))
    return flat, xp.size(tokens, 1), True


def _past_length(xp: Namespace, spec: ArchSpec, cache: Any, batch: Size, count: Size) -> int | None:
    """The number of cached tokens (0 without a cache, None if traced); ValueError if the cache does not fit."""
    if cache is None:
        return 0
    if not spec.causal:
        raise ValueError("a bidirectional model has no cache: leave out past_key_values")
    if len(cache.keys) != spec.layers:
        raise ValueError(f"past_key_values must hold {spec.layers} layers, got {len(cache.keys)}")
    rows = cache.keys[0].shape[0]
    if is_static(batch, rows) and rows != batch:
        raise ValueError(f"past_key_values hold {rows} rows, and the input has {batch}")
    if cache.max_length is None:
        return cache.keys[0].shape[2]
    values = xp.values(cache.length, wait=True)
    past = None if values is None else int(values)
    if is_static(count) and (past or 0) + count > cache.max_length:
        raise ValueError(
            f"the cache has room for {cache.max_length} tokens: {past or 0} are cached and the input has {count}; "
            "make it longer: init_cache(batch, max_length)"
        )
    return past


@dataclass
class _TokenRange:
    """The tokens of a forward pass: `count` new ones, `total` with the past ones (None: dynamic), `limit` the capacity
    of the cache (None: without one)."""

    xp: Namespace
    batch: Size
    count: Size
    total: int | None
    limit: int | None

    def pad_columns(self, name: str, x: Array) -> Array:
        """An input (batch, total), padded with a cache to (batch, limit); columns after `total` are not read."""
        lengths = [n for n in (self.total, self.limit) if n is not None]
        if not any(shapes_match(x.shape, self.batch, length) for length in lengths or [self.count]):
            expected = " or ".join(
                shape_text(self.batch, length) for length in dict.fromkeys(lengths or [self.count])
            )
            cached = "" if self.limit is None and self.total == self.count else ", the cached tokens included"
            raise ValueError(f"{name} must be (batch, tokens) = {expected}{cached}, got {tuple(x.shape)}")
        if self.limit is None or x.shape[1] == self.limit:
            return x
        return self.xp.pad(x, 0, self.limit - self.xp.size(x, 1))


def _check_attention_mask(result: CheckedInputs, mask: Array, span: _TokenRange, *, needed: bool) -> None:
    """Check the mask; it is left out where it is known to mask nothing, unless the head needs it (`needed`)."""
    if (values := span.xp.values(mask)) is not None:
        check_mask(values)
    mask = span.pad_columns("attention_mask", span.xp.int32(mask != 0))
    values = None if needed or span.total is None else span.xp.values(mask)
    if values is None or not values[:, : span.total].all():
        result.given["attention_mask"] = mask


def _check_cache_position(xp: Namespace, positions: Array | None, past: int | None, count: Size) -> None:
    """ValueError unless the positions follow the cached tokens: the cache is written at those slots."""
    values = None if positions is None or past is None else xp.values(positions)
    if values is not None and (
        values.shape != (count,) or values[0] != past or values[-1] != past + count - 1
    ):
        raise ValueError(
            f"cache_position must be {past} to {(past or 0) + count - 1}, the positions after {past} cached tokens, "
            f"got {brief(values.tolist())}"
        )


def _check_position_ids(spec: ArchSpec, result: CheckedInputs, positions: Array, span: _TokenRange) -> None:
    """Position ids, if any, as int32 (batch or 1, tokens); ValueError beyond the position embedding."""
    learned, xp = spec.position(Learned), span.xp
    if positions is not None:
        if len(positions.shape):
            positions = xp.reshape(positions, (-1, xp.size(positions, -1)))
        rows = any(shapes_match(positions.shape, rows, span.count) for rows in (1, span.batch))
        if not (is_integer(positions) and rows):
            raise ValueError(
                f"position_ids must be integers {shape_text(span.batch, span.count)}, got {positions.dtype.name} "
                f"{tuple(positions.shape)}"
            )
        if (values := xp.values(positions)) is not None:
            check_positions(spec, int(values.min()), int(values.max()))
        result.given["position_ids"] = xp.int32(positions)
    if learned is None:
        return
    needed = _positions_used(learned, result.given, span)
    if needed is not None and needed > (room := learned.size - learned.offset):
        raise ValueError(
            f"the model has {room} learned positions, but the sequence, cache included, has {needed} tokens: shorten it"
        )


def _positions_used(learned: Learned, given: dict[str, Any], span: _TokenRange) -> int | None:
    """The number of learned positions that the forward pass needs; None if traced."""
    ids, mask, xp = given.get("input_ids"), given.get("attention_mask"), span.xp
    if (positions := given.get("position_ids")) is not None:
        values = xp.values(positions)
        return None if values is None else int(values.max()) + 1 - learned.offset
    if learned.pad_id is not None and ids is not None:
        values = xp.values(ids)
        return None if values is None else int((values != learned.pad_id).sum(-1).max())
    if mask is None:
        return span.count if span.total is None and is_static(span.count) else span.total
    values = None if span.total is None else xp.values(mask)
    return None if values is None else int(values[:, : span.total].sum(-1).max())


def _separate_documents(xp: Namespace, spec: ArchSpec, result: CheckedInputs, span: _TokenRange) -> bool:
    """Whether position ids restart, so that rows hold several documents; these become segments, combined with those of
    sequence_id."""
    mask = result.given.get("attention_mask")
    # With an empty cache, masks have the length of the cache; the tokens come first.
    mask = None if mask is None else mask[:, : span.count]
    document = document_ids(xp, spec, result.given["position_ids"], mask)
    if document is None:
        return False
    if (segments := result.given.get("sequence_id")) is not None:
        document = segments[:, : span.count] * span.count + document
    result.given["sequence_id"] = document
    return True


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def _check_mc_token_ids(xp: Namespace, tokens: Array, batch: Size, count: Size) -> Array:
    """(batch,): the index of the classification token of each choice."""
    sized = not is_static(batch, *tokens.shape) or math.prod(tokens.shape) == batch
    if not (is_integer(tokens) and sized):
        raise ValueError(
            f"mc_token_ids must be an integer for each of the {shape_text(batch)[1:-1]} rows, got {tokens.dtype.name} "
            f"{tuple(tokens.shape)}"
        )
    values = xp.values(tokens)
    if values is not None and is_static(count) and not (values.min() >= 0 and values.max() < count):
        raise ValueError(
            f"mc_token_ids must be 0 to {count - 1}, positions of the {count} tokens, got {brief(values.tolist())}"
        )
    return xp.int32(xp.reshape(tokens, (-1,)))


def _expand_head_mask(xp: Namespace, spec: ArchSpec, mask: Array) -> Array:
    """(layers, 1, h, 1, 1) from transformers' (heads,) or (layers, heads)."""
    heads = spec.attention.heads
    if tuple(mask.shape) not in ((heads,), (spec.layers, heads)):
        raise ValueError(
            f"head_mask must be ({heads},) or ({spec.layers}, {heads}), a factor for each head, got {tuple(mask.shape)}"
        )
    rows = xp.stacked([xp.reshape(mask, (-1, heads))] * (spec.layers if len(mask.shape) == 1 else 1))
    return xp.reshape(rows, (spec.layers, 1, heads, 1, 1))


def describe_labels(xp: Namespace, name: str, labels: Array) -> Labels:
    """The shape, dtype and values (if they can be read) of labels."""
    open_ = getattr(labels.shape, "rank", 0) is None  # in a graph, even the rank may be unknown
    shape = (None,) if open_ else tuple(labels.shape)
    return Labels(name, shape, labels.dtype.name, xp.values(labels))


def dropout_rates(spec: ArchSpec, head: HeadSpec | None) -> list[float]:
    """All dropout probabilities of a model."""
    found = [spec.dropout.embed, spec.dropout.attention, spec.dropout.residual]
    if head is not None:
        found.append(head.dropout)
        if head.summary is not None:
            found += [head.summary.dropout_in, head.summary.dropout_out]
    return found
