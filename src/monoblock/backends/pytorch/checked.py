"""Validation of a forward's arguments, with one error message per fault.

Values are checked for tensors on the CPU only, to avoid a synchronisation at each token, and not for compiled, traced
or transformed calls, which have none.
"""

from __future__ import annotations

import numbers
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from monoblock import call_checks
from monoblock.backends.pytorch.kernels import dispatch
from monoblock.field_types import brief
from monoblock.spec import ArchSpec

# Arguments that are tensors in every class that has them.
TENSORS = frozenset(
    {
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "token_type_ids",
        "image_patches_indices",
        "cache_position",
        "sequence_id",
        "seq_idx",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "head_mask",
        "mc_token_ids",
        "labels",
        "mc_labels",
        "start_positions",
        "end_positions",
    }
)
INDICES = (torch.int64, torch.int32)  # dtypes that an embedding takes


def check_flag(name: str, value: Any) -> bool:
    """An argument that is True or False. TypeError for arrays, strings and other objects."""
    # Also NumPy's bool, and symbolic booleans.
    if isinstance(value, int) or type(value).__name__ in ("bool", "bool_", "SymBool"):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def check_tensor(name: str, value: Any) -> None:
    """TypeError for an argument that must be a tensor and is none."""
    if isinstance(value, Tensor):
        return
    advice = (
        "model(**inputs) gives each by its name" if isinstance(value, Mapping) else "torch.tensor() makes one"
    )
    raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}: {advice}")


def check_tokens(spec: ArchSpec, ids: Tensor | None, embeds: Tensor | None) -> tuple[int, int, torch.device]:
    """Batch, tokens and device; ValueError for anything that is not a batch of ids or of embeddings."""
    if ids is not None and embeds is not None:
        raise ValueError(
            "You cannot specify both input_ids and inputs_embeds at the same time: give one of them"
        )
    if ids is None and embeds is None:
        raise ValueError("You have to specify either input_ids or inputs_embeds")
    tokens = ids if embeds is None else embeds
    assert tokens is not None
    if embeds is not None and (embeds.dim() != 3 or embeds.shape[2] != spec.width):
        raise ValueError(f"inputs_embeds must be (batch, tokens, {spec.width}), got {tuple(embeds.shape)}")
    if embeds is not None and not embeds.is_floating_point():
        raise ValueError(f"inputs_embeds must be floating-point numbers, got {embeds.dtype}")
    if ids is not None and (ids.dim() != 2 or not is_integer(ids)):
        raise ValueError(f"input_ids must be integers (batch, tokens), got {ids.dtype} {tuple(ids.shape)}")
    if tokens.shape[0] == 0:
        raise ValueError("the input has no rows: give at least one sequence")
    if tokens.shape[1] == 0:
        raise ValueError("the input has no tokens: give at least one (the bos token, for an empty string)")
    if ids is not None:
        check_ids("input_ids", ids, spec)
    return tokens.shape[0], tokens.shape[1], tokens.device


def is_integer(x: Tensor) -> bool:
    """Whether the dtype is an integer type; bool is not."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def as_indices(ids: Tensor) -> Tensor:
    """Integer ids in a dtype that an embedding takes; uint8 indices would be interpreted as a mask."""
    return ids if ids.dtype in INDICES else ids.long()


def check_ids(name: str, ids: Tensor, spec: ArchSpec) -> None:
    """ValueError for ids that the vocabulary does not have."""
    if ids.device.type != "cpu" or not dispatch.readable(ids):
        return
    low, high = (int(x) for x in as_indices(ids).aminmax())
    if low < 0 or high >= spec.vocab:
        raise ValueError(
            f"{name} hold the token {low if low < 0 else high}, but the model's vocabulary has the ids "
            f"0 to {spec.vocab - 1}: is this the tokenizer of this model?"
        )


def check_types(types: Tensor, shape: tuple[int, int], spec: ArchSpec) -> None:
    """ValueError unless there is a token type, which is an id of the vocabulary, for each token."""
    if not is_integer(types) or tuple(types.shape) != shape:
        raise ValueError(
            f"token_type_ids must be integers (batch, tokens) = {shape}, got {types.dtype} {tuple(types.shape)}"
        )
    check_ids("token_type_ids", types, spec)


def check_mask(mask: Tensor) -> None:
    """ValueError for a mask of keys with other values than those of tokens (1) and padding (0)."""
    if mask.device.type == "cpu" and mask.dtype != torch.bool and dispatch.readable(mask):
        mask = mask.detach()
        call_checks.check_mask((mask.float() if mask.dtype == torch.bfloat16 else mask).numpy())


def check_added_mask(mask: Tensor) -> None:
    """ValueError for a mask of queries and keys that would make every score NaN."""
    if mask.dtype == torch.bool or mask.device.type != "cpu" or not dispatch.readable(mask):
        return
    if bool((mask.isnan() | (mask == torch.inf)).any()):
        raise ValueError(
            "a floating-point attention_mask is added to the scores: it must not hold NaN or inf"
        )


def check_positions(spec: ArchSpec, positions: Tensor, batch: int, count: int) -> None:
    """ValueError unless there is an integer for each token, within the table of positions if there is one."""
    rows = positions.shape[0] if positions.dim() == 2 else 1
    if not 1 <= positions.dim() <= 2 or positions.shape[-1] != count or rows not in (1, batch):
        raise ValueError(
            f"position_ids must be (batch, tokens) = ({batch}, {count}), got {tuple(positions.shape)}"
        )
    if not is_integer(positions):
        raise ValueError(f"position_ids must be integers, got {positions.dtype}")
    if positions.device.type != "cpu" or not dispatch.readable(positions):
        return
    low, high = (int(x) for x in positions.long().aminmax())
    call_checks.check_positions(spec, low, high)


def check_cache_position(position: Tensor | None, past: int, count: int) -> None:
    """ValueError unless the positions follow the cached tokens."""
    if position is None or not dispatch.readable(position):
        return
    if not is_integer(position):
        raise ValueError(f"cache_position must be integers, got {position.dtype}")
    if position.shape != (count,) or int(position[0]) != past or int(position[-1]) != past + count - 1:
        got = brief(position.tolist()) if position.dim() == 1 else tuple(position.shape)
        raise ValueError(
            f"cache_position must be {past} to {past + count - 1}, the positions after {past} cached tokens, got "
            f"{got}; crop() the cache to write at an earlier position"
        )


def check_kept(keep: Any, count: int) -> None:
    """ValueError for logits_to_keep that is neither a number of last tokens nor indices (n,) of the `count` tokens."""
    if isinstance(keep, Tensor):
        if not is_integer(keep) or keep.dim() != 1:
            raise ValueError(
                f"logits_to_keep must be how many of the last tokens, or positions of tokens (n,), got {keep.dtype} "
                f"{tuple(keep.shape)}"
            )
        if keep.numel() and keep.device.type == "cpu" and dispatch.readable(keep):
            low, high = (int(x) for x in keep.long().aminmax())
            if low < -count or high >= count:
                raise ValueError(
                    f"logits_to_keep must be positions of the {count} tokens, got {brief(keep.tolist())}"
                )
    elif keep is not None and (isinstance(keep, bool) or not isinstance(keep, numbers.Integral) or keep < 0):
        raise ValueError(f"logits_to_keep must be how many of the last tokens, got {brief(keep)}")


def check_count(count: Any) -> Any:
    """`num_items_in_batch`, or 1 instead of 0, by which an empty sum of losses is divided. ValueError for anything but
    a number of at least 0."""
    if isinstance(count, Tensor):
        if count.numel() != 1 or count.dtype == torch.bool or count.is_complex():
            raise ValueError(f"num_items_in_batch must be one number, got {count.dtype} {tuple(count.shape)}")
        if count.device.type == "cpu" and dispatch.readable(count):
            check_count(count.item())
        return torch.where(count == 0, 1, count).reshape(())
    if isinstance(count, bool) or not isinstance(count, (int, float)) or not 0 <= count <= sys.float_info.max:
        raise ValueError(f"num_items_in_batch must be a number of at least 0, got {brief(count)}")
    return float(count or 1)


def check_chosen(tokens: Tensor, batch: int, count: int) -> None:
    """ValueError unless mc_token_ids are an index of a token for each row."""
    if not is_integer(tokens) or tokens.numel() != batch:
        raise ValueError(
            f"mc_token_ids must be an integer for each of the {batch} rows, got {tokens.dtype} "
            f"{tuple(tokens.shape)}"
        )
    if tokens.device.type == "cpu" and dispatch.readable(tokens):
        low, high = (int(x) for x in tokens.aminmax())
        if low < 0 or high >= count:
            raise ValueError(
                f"mc_token_ids must be 0 to {count - 1}, positions of the {count} tokens, "
                f"got {low if low < 0 else high}"
            )
