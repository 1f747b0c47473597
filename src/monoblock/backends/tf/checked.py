"""A call's arguments, checked and made the tensors that the network takes.

What is traced (in a `tf.function`, a Keras graph) has a shape and no values: what is known of its shape is checked, its
values are not. Values are looked at only in eager mode, and where they lie in the CPU's memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from monoblock.backends.tf.cache import Cache
from monoblock.backends.tf.ops import Size, Tensor, size
from monoblock.backends.tf.patches import NAMES, patches
from monoblock.heads import KINDS, HeadSpec
from monoblock.spec import ArchSpec, Learned, Rotary

CHOOSING = ("choice", "double")
LABELS = ("labels", "mc_labels", "start_positions", "end_positions", "num_items_in_batch")


@dataclass
class Checked:
    """What the network gets: tensors by name, whether the cache is empty, and the choices that the rows are of.
    `legacy`: the cache goes out as tuples."""

    given: dict[str, Any] = field(default_factory=dict[str, Any])
    fresh: bool = True
    choices: Size = 1
    nested: bool = False
    legacy: bool = False


def on_host(x: Tensor) -> np.ndarray[Any, Any] | None:
    """The values, if they can be had without waiting for another device; else None."""
    if not hasattr(x, "numpy") or not tf.executing_eagerly() or "CPU" not in (x.device or "CPU"):
        return None
    return x.numpy()


def checked(
    spec: ArchSpec, head: HeadSpec | None, arguments: dict[str, Any], cache: Cache | None, train: bool
) -> Checked:
    """The arguments (None left out) as the network takes them; ValueError says what is wrong."""
    given = {name: value for name, value in arguments.items() if name not in NAMES}
    made = Checked()
    if head is not None and head.kind in CHOOSING:
        given, made.choices, made.nested = _flattened(given)
    batch, count = _tokens(spec, given, made)
    seen = _seen(spec, cache, batch, count)
    made.fresh = seen == 0
    total = None if seen is None or not isinstance(count, int) else seen + count
    places = _Places(batch, count, total, None if cache is None else cache.max_length)
    if (mask := given.get("attention_mask")) is not None:
        _mask(made, mask, places, needed=head is not None and KINDS[head.kind].pool == "last")
    if (segments := given.get("sequence_id")) is not None:
        if not spec.attention.by_segment:
            raise ValueError(
                "sequence_id would have no effect: the config does not set attn_uses_sequence_id=True"
            )
        made.given["sequence_id"] = places.of("sequence_id", segments)
    elif train and spec.attention.by_segment:
        raise ValueError(
            "the config sets attn_uses_sequence_id=True: training needs sequence_id (batch, tokens)"
        )
    _check_cache_position(given.get("cache_position"), seen, count)
    _positions(spec, made, given.get("position_ids"), places)
    if (types := given.get("token_type_ids")) is not None:
        made.given["token_type_ids"] = _ids(spec, "token_type_ids", types, (batch, count))
    if (tokens := given.get("mc_token_ids")) is not None:
        made.given["mc_token_ids"] = _chosen_tokens(tokens, batch, count)
    if (mask := given.get("head_mask")) is not None:
        made.given["head_mask"] = _head_mask(spec, mask)
    if images := {name: arguments[name] for name in NAMES if name in arguments}:
        made.given |= patches(spec.patches, images, made.given.get("input_ids"), count)
    made.given |= {name: given[name] for name in LABELS if name in given}
    return made


def whole(x: Tensor) -> bool:
    """Whether the numbers are whole."""
    return x.dtype.is_integer


def fits(shape: Any, *expected: Size) -> bool:
    """Whether what is known of a shape agrees with what is known of the sizes."""
    pairs = zip(shape, expected, strict=False)
    open_ = (a is None or not isinstance(b, int) or a == b for a, b in pairs)
    return len(shape) == len(expected) and all(open_)


def shown(*sizes: Size) -> str:
    """Sizes for a message; ? stands for an open one."""
    return "(" + ", ".join(str(x) if isinstance(x, int) else "?" for x in sizes) + ")"


def _tokens(spec: ArchSpec, given: dict[str, Any], made: Checked) -> tuple[Size, Size]:
    """Batch and tokens of the ids or embeddings."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if ids is not None and embeds is not None:
        raise ValueError(
            "You cannot specify both input_ids and inputs_embeds at the same time: give one of them"
        )
    if embeds is not None:
        if len(embeds.shape) != 3 or embeds.shape[2] != spec.width or not embeds.dtype.is_floating:
            raise ValueError(
                f"inputs_embeds must be (batch, tokens, {spec.width}), got {embeds.dtype.name} {tuple(embeds.shape)}"
            )
        made.given["inputs_embeds"] = tokens = embeds
    elif ids is not None:
        made.given["input_ids"] = tokens = _ids(spec, "input_ids", ids, None)
    else:
        raise ValueError("You have to specify either input_ids or inputs_embeds")
    if tokens.shape[1] == 0:
        raise ValueError("the input has no tokens: give at least one (the bos token, if the text is empty)")
    return size(tokens, 0), size(tokens, 1)


def _ids(spec: ArchSpec, name: str, ids: Tensor, shape: tuple[Size, Size] | None) -> Tensor:
    """Token ids as int32 (batch, tokens), of that shape if one is given."""
    empty = 0 in ids.shape  # lists without numbers have no type of their own
    if len(ids.shape) != 2 or not (empty or whole(ids)):
        raise ValueError(
            f"{name} must be whole numbers (batch, tokens), got {ids.dtype.name} {tuple(ids.shape)}"
        )
    if shape is not None and not fits(ids.shape, *shape):
        raise ValueError(f"{name} must be (batch, tokens) = {shown(*shape)}, got {tuple(ids.shape)}")
    if (values := on_host(ids)) is not None and values.size:
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= spec.vocab:
            raise ValueError(
                f"{name} hold the token {low if low < 0 else high}, but the model's vocabulary has the ids "
                f"0 to {spec.vocab - 1}: is this the tokenizer of this model?"
            )
    return tf.cast(ids, tf.int32)


def _flattened(given: dict[str, Any]) -> tuple[dict[str, Any], Size, bool]:
    """Choices as rows: (batch, choices, tokens) becomes (batch * choices, tokens); what has rows already stays."""
    name, dims = ("input_ids", 3) if "inputs_embeds" not in given else ("inputs_embeds", 4)
    tokens = given.get(name)
    if tokens is None or len(tokens.shape) != dims:
        return given, 1, False
    choices, flat = size(tokens, 1), dict(given)
    for name in ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"):
        value = given.get(name)
        if value is not None and len(value.shape) == (4 if name == "inputs_embeds" else 3):
            known = value.shape
            rows = -1 if None in known[:2] else known[0] * known[1]
            flat[name] = tf.reshape(value, (rows, *(size(value, i) for i in range(2, len(known)))))
    return flat, choices, True


def _seen(spec: ArchSpec, cache: Cache | None, batch: Size, count: Size) -> int | None:
    """How many tokens the cache holds (0 without one), None if that is traced; ValueError if it does not fit."""
    if cache is None:
        return 0
    if len(cache.keys) != spec.layers:
        raise ValueError(f"past_key_values must hold {spec.layers} layers, got {len(cache.keys)}")
    rows = cache.keys[0].shape[0]
    if isinstance(batch, int) and rows not in (None, batch):
        raise ValueError(f"past_key_values hold {rows} rows, and the input has {batch}")
    if cache.max_length is None:
        return cache.keys[0].shape[2]
    values = on_host(cache.length)
    seen = None if values is None else int(values)
    if isinstance(count, int) and (seen or 0) + count > cache.max_length:
        raise ValueError(
            f"the cache holds {cache.max_length} tokens: {seen or 0} are in it and {count} more came; make it "
            "longer: init_cache(batch, max_length)"
        )
    return seen


@dataclass
class _Places:
    """Where tokens are: `count` come in, `total` with those before (None: not known), `limit` fit the cache, if it has
    one."""

    batch: Size
    count: Size
    total: int | None
    limit: int | None

    def of(self, name: str, x: Tensor) -> Tensor:
        """(batch, total), or with a cache (batch, limit), where places after the tokens may hold anything."""
        lengths = [n for n in (self.total, self.limit) if n is not None]
        if not any(fits(x.shape, self.batch, length) for length in lengths or [self.count]):
            ways = " or ".join(shown(self.batch, length) for length in dict.fromkeys(lengths))
            cached = "" if self.total == self.count else ", the cached tokens included"
            raise ValueError(f"{name} must be (batch, tokens) = {ways}{cached}, got {tuple(x.shape)}")
        if self.limit is None or x.shape[1] == self.limit:
            return x
        return tf.pad(x, ((0, 0), (0, self.limit - size(x, 1))))


def _mask(made: Checked, mask: Tensor, places: _Places, *, needed: bool) -> None:
    """The mask; left out where it is known to mask nothing, unless the head is to see it."""
    mask = places.of("attention_mask", tf.cast(mask != 0, tf.int32))
    values = None if needed or places.total is None else on_host(mask)
    if values is None or not values[:, : places.total].all():
        made.given["attention_mask"] = mask


def _check_cache_position(positions: Tensor | None, seen: int | None, count: Size) -> None:
    """Positions must follow the cache; anything else would be written to one place and seen from another."""
    values = None if positions is None or seen is None else on_host(positions)
    if values is not None and (
        values.shape != (count,) or values[0] != seen or values[-1] != seen + count - 1
    ):
        raise ValueError(
            f"cache_position must be {seen} to {(seen or 0) + count - 1}, the places after the {seen} cached tokens, "
            f"got {values.tolist()}"
        )


def _positions(spec: ArchSpec, made: Checked, positions: Tensor | None, places: _Places) -> None:
    """Position ids as int32 (batch or 1, tokens); ValueError if the table of positions has no such row."""
    learned = spec.position(Learned)
    if positions is not None:
        given: Any = tf.reshape(positions, (-1, size(positions, -1))) if len(positions.shape) else positions
        rows = fits(given.shape, 1, places.count) or fits(given.shape, places.batch, places.count)
        if not (whole(given) and rows):
            raise ValueError(
                f"position_ids must be whole numbers {shown(places.batch, places.count)}, got {given.dtype.name} "
                f"{tuple(given.shape)}"
            )
        made.given["position_ids"] = tf.cast(given, tf.int32)
    if learned is None:
        return
    needed = _needed(learned, made.given, places)
    if needed is not None and needed > (room := learned.size - learned.offset):
        raise ValueError(
            f"the model has {room} learned positions, but the text with its past has {needed} tokens: shorten it"
        )


def _needed(learned: Learned, given: dict[str, Any], places: _Places) -> int | None:
    """How many rows of the position table the call reaches; None if that is traced."""
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if (positions := given.get("position_ids")) is not None:
        values = on_host(positions)
        return None if values is None else int(values.max()) + 1 - learned.offset
    if learned.pad_id is not None and ids is not None:
        values = on_host(ids)
        return None if values is None else int((values != learned.pad_id).sum(-1).max())
    if mask is None:
        return places.total
    values = None if places.total is None else on_host(mask)
    return None if values is None else int(values[:, : places.total].sum(-1).max())


def _chosen_tokens(tokens: Tensor, batch: Size, count: Size) -> Tensor:
    """The token that stands for each choice, (batch,)."""
    values = on_host(tokens)
    known = tokens.shape.num_elements()
    if not whole(tokens) or (isinstance(batch, int) and known not in (None, batch)):
        raise ValueError(
            f"mc_token_ids must be a whole number for each of the {shown(batch)} texts, got {tokens.dtype.name} "
            f"{tuple(tokens.shape)}"
        )
    if values is not None and not (values.min() >= 0 and values.max() < count):
        raise ValueError(f"mc_token_ids must be 0 to {count - 1}, got {values.tolist()}")
    return tf.cast(tf.reshape(tokens, (-1,)), tf.int32)


def _head_mask(spec: ArchSpec, mask: Tensor) -> Tensor:
    """(layers, 1, h, 1, 1) from the hub's (heads,) or (layers, heads)."""
    heads = spec.attention.heads
    if tuple(mask.shape) not in ((heads,), (spec.layers, heads)):
        raise ValueError(
            f"head_mask must be ({heads},) or ({spec.layers}, {heads}), a factor for each head, got {tuple(mask.shape)}"
        )
    return tf.broadcast_to(mask, (spec.layers, heads))[:, None, :, None, None]


def has_positions(spec: ArchSpec) -> bool:
    """Whether position ids act on this model."""
    return any(isinstance(p, Learned | Rotary) for p in spec.positions)


def dropouts(spec: ArchSpec, head: HeadSpec | None) -> list[float]:
    """Every probability of dropout in a model."""
    found = [spec.dropout.embed, spec.dropout.attention, spec.dropout.residual]
    if head is not None:
        found.append(head.dropout)
        if head.summary is not None:
            found += [head.summary.dropout_in, head.summary.dropout_out]
    return found
