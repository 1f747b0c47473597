"""Converts a forward's arguments to the ForwardContext of the blocks: masks, positions, documents and the cache."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from monoblock.backends.pytorch import checked
from monoblock.backends.pytorch.cache import Cache, DynamicCache, from_tuples, to_tuples
from monoblock.backends.pytorch.foreign_cache import fill_foreign, from_foreign, is_foreign
from monoblock.backends.pytorch.kernels import dispatch
from monoblock.backends.pytorch.model import ForwardContext
from monoblock.backends.pytorch.ops import Scope
from monoblock.heads import CHOICE_INPUTS
from monoblock.positions import has_positions, is_dynamic
from monoblock.spec import ArchSpec, Learned, Rotary

log = logging.getLogger("monoblock")


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning once per message."""
    log.warning(message)


@dataclass
class Inputs:
    """The context for the blocks, and the form in which the cache was passed: a tuple format, or transformers'
    object."""

    context: ForwardContext
    form: Any

    def past(self) -> Any:
        """The cache in the form in which it was passed."""
        return in_form(self.context.cache, self.form)


def prepare(
    spec: ArchSpec, shape: tuple[int, int, torch.device], given: dict[str, Any], use_cache: bool
) -> Inputs:
    """The context for the blocks. `given`: the forward's arguments by name. ValueError: an invalid argument."""
    batch, count, device = shape
    if (positions := given.get("position_ids")) is not None:
        checked.check_positions(spec, positions, batch, count)
    cache, form = _cache(spec, given.get("past_key_values"), batch, use_cache)
    past = cache.get_seq_length() if cache is not None else 0
    total = past + count
    index_k = torch.arange(total, device=device)
    checked.check_cache_position(given.get("cache_position"), past, count)
    valid, whole = _masks(spec, given.get("attention_mask"), batch, past, count)
    lengths = _lengths(given, shape, past)
    if lengths is not None:
        key_positions = _flattened_positions(lengths, count, device)
    else:
        key_positions = index_k[None] if valid is None else _counted(spec, valid, index_k)
    positions = _positions(spec, given, key_positions[:, past:], total, documents=lengths is not None)
    scope = Scope(
        index_q=index_k[past:],
        index_k=index_k,
        causal=spec.causal and whole is None,
        aligned=past == 0,
        valid_bk=valid,
        segment_bk=_segments(spec, given, lengths, valid, shape, total),
        given=whole,
        masked_rows=spec.attention.masked_rows,
    )
    context = ForwardContext(
        scope=scope,
        positions_bs=positions,
        key_positions_bk=key_positions,
        cache=cache,
        head_mask=_head_mask(spec, given.get("head_mask")),
    )
    return Inputs(context, form)


def _counted(spec: ArchSpec, valid_bk: Tensor, index_k: Tensor) -> Tensor:
    """(b, k), the position of each token. Padding is not counted, so that a row of a batch has the positions of the
    sequence alone; right padding continues from the row's first token, as in transformers, since losses of spans read
    its logits. With dynamic RoPE, which depends on a row's length, right padding has the last token's position."""
    counted = (valid_bk.long().cumsum(-1) - 1).clamp(min=0)
    if is_dynamic(spec.position(Rotary)):
        return counted
    later = (index_k - valid_bk.long().argmax(-1, keepdim=True)).clamp(min=0)
    if (learned := spec.position(Learned)) is not None:
        later = later.clamp(max=learned.size - learned.offset - 1)
    return torch.where(valid_bk, counted, later)


def _positions(
    spec: ArchSpec, given: dict[str, Any], counted_bs: Tensor, total: int, *, documents: bool
) -> Tensor:
    """The position of each new token: as given, else counted; an index of the table if there is one. `total`: the
    number of tokens, the cached ones included. `documents`: positions are counted per document of a packed row."""
    learned, ids = spec.position(Learned), given.get("input_ids")
    positions = given.get("position_ids")
    if positions is not None:
        positions = positions.reshape(-1, positions.shape[-1]).long()
    elif learned is None:
        positions = counted_bs
    elif learned.pad_id is not None and ids is not None and not documents:
        real = ids != learned.pad_id
        positions = real.long().cumsum(-1) * real + learned.offset - 1
    else:
        positions = counted_bs + learned.offset
    if learned is None or not dispatch.readable(positions):
        return positions
    if given.get("position_ids") is None and total + learned.offset <= learned.size:
        return positions  # reading the maximum would synchronise with the device at each token
    if int(positions.max()) >= learned.size:
        room, needed = learned.size - learned.offset, int(positions.max()) + 1 - learned.offset
        raise ValueError(
            f"the model has {room} learned positions, but the sequence, cache included, has {needed} tokens: shorten it"
        )
    return positions


def _head_mask(spec: ArchSpec, mask: Tensor | None) -> Tensor | None:
    """(layers, 1, h, 1, 1) from transformers' (heads,) or (layers, heads)."""
    if mask is None:
        return None
    heads = spec.attention.heads
    if mask.shape not in ((heads,), (spec.layers, heads)):
        raise ValueError(
            f"head_mask must be ({heads},) or ({spec.layers}, {heads}), a factor for each head, got {tuple(mask.shape)}"
        )
    return mask.expand(spec.layers, heads)[:, None, :, None, None]


def in_form(cache: Cache | None, form: Any) -> Any:
    """The cache in the form in which it was passed: itself, tuples, or transformers' object, which is updated."""
    if cache is None or form is None:
        return cache
    if isinstance(form, str):
        return to_tuples(cache, form)
    assert isinstance(cache, DynamicCache)
    fill_foreign(form, cache)
    return form


def cache_of(past: Any, spec: ArchSpec, batch: int) -> tuple[Cache, Any]:
    """The cache of `past_key_values`, and the form in which it was passed; see `in_form`."""
    if isinstance(past, Cache):
        return past, None
    if is_foreign(past):
        return from_foreign(past, spec.windows), past
    if not isinstance(past, Sequence) or isinstance(past, str):
        raise ValueError(f"past_key_values must be a Cache or a tuple of layers, got {type(past).__name__}")
    if len(past) != spec.layers:
        raise ValueError(f"past_key_values must hold {spec.layers} layers, got {len(past)}")
    return from_tuples(past, batch)


def _cache(spec: ArchSpec, past: Any, batch: int, use_cache: bool) -> tuple[Cache | None, Any]:
    if not spec.causal and (use_cache or past is not None):
        raise ValueError("a bidirectional model has no cache: leave out use_cache and past_key_values")
    if past is None:
        return (DynamicCache(config=spec) if use_cache else None), None
    return cache_of(past, spec, batch)


def _masks(
    spec: ArchSpec, mask: Tensor | None, batch: int, past: int, count: int
) -> tuple[Tensor | None, Tensor | None]:
    """A mask of keys as booleans (b, past + count), None if nothing is masked; or a mask of queries and keys."""
    if mask is None:
        return None, None
    total, heads = past + count, spec.attention.heads
    if mask.dim() == 4:
        sizes = zip(mask.shape, ((1, batch), (1, heads), (count,), (total,)), strict=True)
        if not all(size in fitting for size, fitting in sizes):
            raise ValueError(
                f"a 4-D attention_mask must be (batch, 1 or heads, queries, keys) = ({batch}, 1 or {heads}, {count}, "
                f"{total}), the {past} cached tokens included, got {tuple(mask.shape)}"
            )
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(
                "a 4-D attention_mask must be boolean (True: may attend) or floating-point (added to the scores), got "
                f"{mask.dtype}"
            )
        checked.check_added_mask(mask)
        return None, mask
    if mask.dim() != 2 or mask.shape != (batch, total):
        raise ValueError(
            f"attention_mask must be (batch, tokens) = ({batch}, {total}), the {past} cached tokens included, "
            f"got {tuple(mask.shape)}"
        )
    checked.check_mask(mask)
    valid = mask != 0
    return (None if dispatch.readable(mask) and bool(valid.all()) else valid), None


# ---------------------------------------------------------------------------- packed documents

# Keywords of every forward for the boundaries of the documents in packed rows.
PACKED = ("sequence_id", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def _lengths(given: dict[str, Any], shape: tuple[int, int, torch.device], past: int) -> Tensor | None:
    """The offsets of the documents in one flattened row, and its end: `cu_seq_lens_q`, which must equal
    `cu_seq_lens_k`. The maximum lengths are checked against them."""
    both = [given.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
    longest = [x for x in (given.get("max_length_q"), given.get("max_length_k")) if x is not None]
    found = [x for x in both if x is not None]
    if not found:
        if longest:
            raise ValueError("max_length_q and max_length_k come with cu_seq_lens_q and cu_seq_lens_k")
        return None
    batch, count, device = shape
    if batch != 1 or past:
        raise ValueError(
            "cu_seq_lens_q are of one flattened row without a cache: input_ids must be (1, tokens), got "
            f"{batch} rows and {past} cached tokens"
        )
    if any(x.dim() != 1 or x.shape != found[0].shape or x.shape[0] < 2 for x in found):
        raise ValueError(
            "cu_seq_lens_q and cu_seq_lens_k must be (documents + 1,) and equal, got "
            + " and ".join(str(tuple(x.shape)) for x in found)
        )
    if dispatch.readable(*found):
        ends = found[0].tolist()
        lengths = [stop - start for start, stop in itertools.pairwise(ends)]
        if ends[0] != 0 or ends[-1] != count or min(lengths) < 0 or found[-1].tolist() != ends:
            raise ValueError(
                f"cu_seq_lens_q and cu_seq_lens_k must both grow from 0 to the {count} tokens, got "
                + " and ".join(str(x.tolist()) for x in found)
            )
        if any(int(x) < max(lengths) for x in longest):
            raise ValueError(
                f"max_length_q and max_length_k must be the longest document's {max(lengths)} tokens, got {longest}"
            )
    return found[0].to(device)


def _document(lengths: Tensor, count: int, device: torch.device) -> Tensor:
    """(1, tokens), the number of each token's document."""
    return (torch.arange(count, device=device)[:, None] >= lengths[1:]).sum(-1)[None]


def _flattened_positions(lengths: Tensor, count: int, device: torch.device) -> Tensor:
    """(1, tokens), each token's position in its document."""
    return torch.arange(count, device=device) - lengths[_document(lengths, count, device)]


def _segments(
    spec: ArchSpec,
    given: dict[str, Any],
    lengths: Tensor | None,
    valid: Tensor | None,
    shape: tuple[int, int, torch.device],
    total: int,
) -> Tensor | None:
    """(b, past + count), the document id of each token of packed rows: by `cu_seq_lens_q`, else by positions that
    restart; and by `sequence_id`. None: one document."""
    batch, count, device = shape
    document = None
    positions = given.get("position_ids")
    if lengths is not None:
        document = _document(lengths, count, device)
    elif positions is not None and given.get("past_key_values") is None:
        document = _restarts(spec, positions.reshape(-1, count), valid)
    if positions is not None and document is None and not has_positions(spec):
        warn_once("position_ids have no effect on a model that encodes positions as distances")
    both = [given.get(name) for name in ("sequence_id", "seq_idx")]
    if all(x is not None for x in both):
        raise ValueError("sequence_id and seq_idx are two names of each token's document: give one")
    sequence = both[0] if both[1] is None else both[1]
    if sequence is not None:
        if sequence.shape != (batch, total):
            raise ValueError(
                f"sequence_id must be (batch, tokens) = ({batch}, {total}), got {tuple(sequence.shape)}"
            )
        document = sequence if document is None else sequence.long() * total + document
    return None if document is None else document.expand(batch, -1)


def _restarts(spec: ArchSpec, positions_bs: Tensor, valid: Tensor | None) -> Tensor | None:
    """The document id of each token: a position that is not higher than the previous one begins a document. None: there
    is one document. Positions of padding are ignored."""
    before, here = positions_bs[:, :-1], positions_bs[:, 1:]
    begins = here <= before
    learned = spec.position(Learned)
    if learned is not None and learned.pad_id is not None:
        begins = begins & (here >= learned.offset)  # lower ones are padding's
    if valid is not None:
        begins = valid[:, 1:] & torch.where(valid[:, :-1], begins, here < before)
    if dispatch.readable(positions_bs) and not bool(begins.any()):
        return None
    return F.pad(begins.long().cumsum(-1), (1, 0))


def flattened(given: dict[str, Any]) -> dict[str, Any]:
    """Choices as rows: (batch, choices, tokens) becomes (batch * choices, tokens); other shapes are unchanged.

    Adds "choices" and "nested".
    """
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    tokens, dims = (ids, 3) if embeds is None else (embeds, 4)
    nested = tokens is not None and tokens.dim() == dims
    flat = dict(given, choices=tokens.shape[1] if nested and tokens is not None else 1, nested=nested)
    if nested:
        for name in CHOICE_INPUTS:
            value = flat.get(name)
            if value is not None and value.dim() == (4 if name == "inputs_embeds" else 3):
                flat[name] = value.flatten(0, 1)
    return flat
