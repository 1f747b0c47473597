"""A call's arguments, checked and made the arrays that the network takes.

What is traced (under `jit`, `grad`, `vmap`) has a shape and no values: its shape is checked, its values are not. Values
are looked at only where that costs no transfer: in NumPy arrays, and in JAX's on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from monoblock.backends.flax.cache import Cache
from monoblock.backends.flax.patches import patches
from monoblock.heads import KINDS, HeadSpec
from monoblock.spec import ArchSpec, Learned, Rotary

CHOOSING = ("choice", "double")


@dataclass
class Checked:
    """What the network gets: arrays by name, whether the cache is empty, and the choices that the rows are of."""

    given: dict[str, Any] = field(default_factory=dict[str, Any])
    fresh: bool = True
    choices: int = 1
    nested: bool = False


def as_array(name: str, value: Any) -> Any:
    """A JAX or NumPy array; ValueError for what cannot be one."""
    if isinstance(value, jax.Array):
        return value
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} must be an array, or nested lists of equal lengths") from error
    if array.dtype == object:
        raise ValueError(f"{name} must be an array of numbers, got {type(value).__name__}")
    return array


def on_host(array: Any, *, wait: bool = False) -> np.ndarray | None:
    """The values, if they can be had without waiting for another device (unless `wait`); else None."""
    if isinstance(array, np.ndarray):
        return array
    if isinstance(array, Tracer) or not array.is_fully_addressable:
        return None
    near = wait or all(device.platform == "cpu" for device in array.devices())
    return np.asarray(array) if near else None


def checked(
    spec: ArchSpec, head: HeadSpec | None, arguments: dict[str, Any], cache: Any, train: bool
) -> Checked:
    """The arguments (None where one was not given) as the network takes them; ValueError says what is wrong."""
    given = {
        name: as_array(name, value)
        for name, value in arguments.items()
        if value is not None and name not in _PATCHES
    }
    made = Checked()
    if head is not None and head.kind in CHOOSING:
        given, made.choices, made.nested = _flattened(given)
    batch, count = _tokens(spec, given, made)
    seen = _seen(spec, cache, batch, count)
    made.fresh = seen == 0
    total = None if seen is None else seen + count
    places = _Places(batch, count, total, None if cache is None else cache.max_length)
    if (mask := given.get("attention_mask")) is not None:
        _mask(made, mask, places, needed=head is not None and KINDS[head.kind].pool == "last")
    if (segments := given.get("sequence_id")) is not None:
        if not spec.attention.by_segment:
            raise ValueError(
                "sequence_id would have no effect: the config does not set attn_uses_sequence_id=True"
            )
        made.given["sequence_id"] = places.of("sequence_id", segments).astype(np.int32)
    elif train and spec.attention.by_segment:
        raise ValueError(
            "the config sets attn_uses_sequence_id=True: training needs sequence_id (batch, tokens)"
        )
    _positions(spec, made, given.get("position_ids"), places)
    if (types := given.get("token_type_ids")) is not None:
        made.given["token_type_ids"] = _ids(spec, "token_type_ids", types, (batch, count))
    if (tokens := given.get("mc_token_ids")) is not None:
        made.given["mc_token_ids"] = _chosen_tokens(tokens, batch, count)
    images = {name: arguments[name] for name in _PATCHES if arguments.get(name) is not None}
    if images:
        made.given |= patches(spec.patches, images, made.given.get("input_ids"), (batch, count))
    return made


_PATCHES = ("image_patches", "image_patches_indices", "pixel_values")


def _tokens(spec: ArchSpec, given: dict[str, Any], made: Checked) -> tuple[int, int]:
    """Batch and tokens of the ids or embeddings."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if ids is not None and embeds is not None:
        raise ValueError(
            "You cannot specify both input_ids and inputs_embeds at the same time: give one of them"
        )
    if embeds is not None:
        if (
            embeds.ndim != 3
            or embeds.shape[2] != spec.width
            or not jnp.issubdtype(embeds.dtype, jnp.floating)
        ):
            raise ValueError(
                f"inputs_embeds must be (batch, tokens, {spec.width}), got {embeds.dtype} {embeds.shape}"
            )
        shape = made.given.setdefault("inputs_embeds", embeds).shape[:2]
    elif ids is not None:
        shape = made.given.setdefault("input_ids", _ids(spec, "input_ids", ids, None)).shape
    else:
        raise ValueError("You have to specify either input_ids or inputs_embeds")
    if shape[1] == 0:
        raise ValueError("the input has no tokens: give at least one (the bos token, if the text is empty)")
    return shape


def _ids(spec: ArchSpec, name: str, ids: Any, shape: tuple[int, int] | None) -> Any:
    """Token ids as int32 (batch, tokens), of that shape if one is given."""
    empty = ids.size == 0 and isinstance(ids, np.ndarray)  # lists without numbers have no type of their own
    if ids.ndim != 2 or not (empty or jnp.issubdtype(ids.dtype, jnp.integer)):
        raise ValueError(f"{name} must be whole numbers (batch, tokens), got {ids.dtype} {ids.shape}")
    if shape is not None and ids.shape != shape:
        raise ValueError(f"{name} must be (batch, tokens) = {shape}, got {ids.shape}")
    if ids.size and (values := on_host(ids)) is not None:
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= spec.vocab:
            raise ValueError(
                f"{name} hold the token {low if low < 0 else high}, but the model's vocabulary has the ids "
                f"0 to {spec.vocab - 1}: is this the tokenizer of this model?"
            )
    return ids.astype(np.int32)


def _flattened(given: dict[str, Any]) -> tuple[dict[str, Any], int, bool]:
    """Choices as rows: (batch, choices, tokens) becomes (batch * choices, tokens); what has rows already stays."""
    name, dims = ("input_ids", 3) if "inputs_embeds" not in given else ("inputs_embeds", 4)
    tokens = given.get(name)
    if tokens is None or tokens.ndim != dims:
        return given, 1, False
    rows = tokens.shape[0] * tokens.shape[1]

    def flat(name: str, value: Any) -> Any:
        nested = value.ndim == (4 if name == "inputs_embeds" else 3)
        return value.reshape(rows, *value.shape[2:]) if nested else value

    return {name: flat(name, value) for name, value in given.items()}, tokens.shape[1], True


def _seen(spec: ArchSpec, cache: Any, batch: int, count: int) -> int | None:
    """How many tokens the cache holds (0 without one), None if that is traced; ValueError if it does not fit."""
    if cache is None:
        return 0
    if not spec.causal:
        raise ValueError("a model that looks both ways has no cache: leave out past_key_values")
    if not isinstance(cache, Cache):
        raise ValueError(
            f"past_key_values must be what init_cache(batch, max_length) or an output holds, got {type(cache).__name__}"
        )
    if len(cache.keys) != spec.layers:
        raise ValueError(f"past_key_values must hold {spec.layers} layers, got {len(cache.keys)}")
    if cache.keys[0].shape[0] != batch:
        raise ValueError(f"past_key_values hold {cache.keys[0].shape[0]} rows, and the input has {batch}")
    length = on_host(cache.length, wait=True)
    seen = None if length is None else int(length)
    if (seen or 0) + count > cache.max_length:
        raise ValueError(
            f"the cache holds {cache.max_length} tokens: {seen or 0} are in it and {count} more came; make it "
            "longer: init_cache(batch, max_length)"
        )
    return seen


@dataclass
class _Places:
    """Where tokens are: `count` come in, `total` with those before (None: traced), `limit` fit the cache, if any."""

    batch: int
    count: int
    total: int | None
    limit: int | None

    def of(self, name: str, array: Any) -> Any:
        """(batch, total), or with a cache (batch, limit), where places after the tokens may hold anything."""
        lengths = [length for length in (self.total, self.limit) if length is not None]
        if array.ndim != 2 or array.shape[0] != self.batch or array.shape[1] not in lengths:
            ways = " or ".join(f"({self.batch}, {length})" for length in dict.fromkeys(lengths))
            cached = "" if self.limit is None else ", the cached tokens included"
            raise ValueError(f"{name} must be (batch, tokens) = {ways}{cached}, got {tuple(array.shape)}")
        if self.limit is None or array.shape[1] == self.limit:
            return array
        pad = ((0, 0), (0, self.limit - array.shape[1]))
        return np.pad(array, pad) if isinstance(array, np.ndarray) else jnp.pad(array, pad)


def _mask(made: Checked, mask: Any, places: _Places, *, needed: bool) -> None:
    """The mask as booleans; left out where it is known to mask nothing, unless the head is to see it."""
    mask = places.of("attention_mask", mask != 0)
    values = None if needed or places.total is None else on_host(mask)
    if values is None or not values[:, : places.total].all():
        made.given["attention_mask"] = mask


def _positions(spec: ArchSpec, made: Checked, positions: Any, places: _Places) -> None:
    """Position ids as int32 (batch or 1, tokens); ValueError if the table of positions has no such row."""
    learned = spec.position(Learned)
    if positions is not None:
        whole = jnp.issubdtype(positions.dtype, jnp.integer)
        positions = positions.reshape(-1, positions.shape[-1]) if positions.ndim else positions
        fits = positions.ndim == 2 and positions.shape[0] in (1, places.batch)
        if not (whole and fits and positions.shape[1] == places.count):
            raise ValueError(
                f"position_ids must be whole numbers (batch, {places.count}), got {positions.dtype} "
                f"{tuple(positions.shape)}"
            )
        made.given["position_ids"] = positions.astype(np.int32)
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
        return places.count if places.total is None else places.total
    values = None if places.total is None else on_host(mask)
    return None if values is None else int(values[:, : places.total].sum(-1).max())


def _chosen_tokens(tokens: Any, batch: int, count: int) -> Any:
    """The token that stands for each choice, (batch,)."""
    if tokens.size != batch or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"mc_token_ids must be a whole number for each of the {batch} texts, got {tokens.dtype} {tokens.shape}"
        )
    values = on_host(tokens)
    if values is not None and not (values.min() >= 0 and values.max() < count):
        raise ValueError(f"mc_token_ids must be 0 to {count - 1}, got {values.tolist()}")
    return tokens.reshape(-1).astype(np.int32)


def has_positions(spec: ArchSpec) -> bool:
    """Whether position ids act on this model."""
    return any(isinstance(p, Learned | Rotary) for p in spec.positions)


def dropouts(spec: ArchSpec, head: HeadSpec | None) -> Sequence[float]:
    """Every probability of dropout in a model."""
    found = [spec.dropout.embed, spec.dropout.attention, spec.dropout.residual]
    if head is not None:
        found.append(head.dropout)
        if head.summary is not None:
            found += [head.summary.dropout_in, head.summary.dropout_out]
    return found
