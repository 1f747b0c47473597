"""Limits of a `generate` call: vocabulary ids, learned positions, rows and memory, checked before any forward pass."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from monoblock.generation.checks import as_ids
from monoblock.generation.config import GenerationConfig
from monoblock.spec import ArchSpec

MOST_ROWS = 2**16  # sequences of one call, beams included

# Fields whose ids are indices into the scores.
_ID_FIELDS = ("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")


def check_ids(config: GenerationConfig, vocab: int | None, explicit: Iterable[str]) -> None:
    """ValueError for a field with an id outside the vocabulary; eos tokens are checked only if the call sets them
    explicitly, since those of a file are harmless. None: the size of the vocabulary is not known yet."""
    if vocab is None:
        return
    named: dict[str, Sequence[int]] = {name: as_ids(getattr(config, name)) for name in _ID_FIELDS}
    named["bad_words_ids"] = [id for word in config.bad_words_ids or () for id in word]
    named["sequence_bias"] = [id for ids in _biased(config.sequence_bias) for id in ids]
    if "eos_token_id" in explicit:
        named["eos_token_id"] = config.eos_ids
    for name, ids in named.items():
        if (outside := next((id for id in ids if not 0 <= id < vocab), None)) is not None:
            raise ValueError(
                f"GenerationConfig.{name} holds the token {outside}, but the model's vocabulary has the ids 0 to "
                f"{vocab - 1}"
            )


def _biased(value: Mapping[tuple[int, ...], float] | Sequence[Any] | None) -> Iterable[Sequence[int]]:
    if isinstance(value, Mapping):
        return value.keys()
    return (ids for ids, _ in value or ())


def check_pad(pad: int, vocab: int | None) -> None:
    """ValueError for a pad token outside the vocabulary: it would be fed to the model for finished rows."""
    if vocab is not None and pad >= vocab:
        raise ValueError(
            f"rows that finish early are filled with the token {pad}, but the model's vocabulary has the ids 0 to "
            f"{vocab - 1}: set another pad_token_id"
        )


def check_prompt(name: str, low: int, high: int, vocab: int | None) -> None:
    """ValueError for prompts, the argument `name`, whose ids range from `low` to `high` and leave the vocabulary."""
    if low < 0 or (vocab is not None and high >= vocab):
        known = "" if vocab is None else f", but the model's vocabulary has the ids 0 to {vocab - 1}"
        raise ValueError(
            f"{name} hold the token {low if low < 0 else high}{known}: is this the tokenizer of this model?"
        )


def check_rows(batch: int, copies: int) -> None:
    """ValueError for more than MOST_ROWS rows."""
    if batch * copies > MOST_ROWS:
        raise ValueError(
            f"{copies} sequences for each of {batch} prompts are {batch * copies} rows, more than the {MOST_ROWS} of a "
            "call: lower num_beams or num_return_sequences, or give fewer prompts at a time"
        )


def check_room(what: str, used: int, new: int, positions: int | None) -> None:
    """ValueError where `used` positions of `what` and `new` tokens exceed the table of learned positions. The last new
    token is not fed back and needs none."""
    if positions is None or used + new - 1 <= positions:
        return
    if (room := positions - used + 1) < 1:
        raise ValueError(
            f"{what} has {used} tokens, and the model has {positions} learned positions: shorten it"
        )
    raise ValueError(
        f"{new} new tokens do not fit: the model has {positions} learned positions and {what} takes {used} of them, so "
        f"that at most {room} can follow"
    )


def check_memory(spec: ArchSpec, rows: int, tokens: int, itemsize: int, times: int = 1) -> None:
    """ValueError for a preallocated cache larger than `times` the memory of the machine."""
    att, memory = spec.attention, host_memory()
    slots = sum(min(tokens, window or tokens) for window in spec.windows)
    size = 2 * slots * rows * att.kv_heads * att.head_dim * itemsize
    if memory is not None and size > times * memory:
        raise ValueError(
            f"a cache of {tokens} tokens for {rows} rows takes {size / 2**30:,.0f} GiB, and this machine has "
            f"{memory / 2**30:,.0f}: set a smaller max_new_tokens (or max_length)"
        )


def host_memory() -> int | None:
    """Bytes of physical memory of this machine; None where the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
