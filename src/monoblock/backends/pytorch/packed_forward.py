"""Hidden states of several sequences without padding, by one call of the native library on a CPU.

The tokens of all sequences are the rows of one matrix, so nothing is computed for padding. A sequence's states do not
depend on the others, to the bit. Weights may be float32, bfloat16 or quantised; activations are float32.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monoblock import native
from monoblock.backends.pytorch import input_rounding
from monoblock.backends.pytorch.base import ModelBase
from monoblock.backends.pytorch.kernels import dispatch, low_rank, native_ops
from monoblock.backends.pytorch.native_weights import (
    Inventory,
    NativeWeights,
    common_dtype,
    library_obstacle,
    weights,
    weights_obstacle,
)
from monoblock.backends.pytorch.ops import relative_position_bucket
from monoblock.native.abi import PackedForward
from monoblock.positions import is_dynamic
from monoblock.spec import ArchSpec, Buckets, Learned, Rotary

Ints = np.ndarray[Any, np.dtype[np.int64]]


def obstacle(model: ModelBase, inventory: Inventory | None = None) -> str | None:
    """Why the library cannot compute this model's hidden states; None if it can. `inventory`: after its
    `fuse_groups`."""
    if (why := library_obstacle(model)) is not None:
        return why
    if is_dynamic(model.spec.position(Rotary)):
        return "dynamic RoPE scaling"
    if model.training:
        return "training mode"
    if common_dtype(model) == torch.bfloat16 and native.only_torch_has_amx():
        return "AMX, with which PyTorch's bfloat16 products are faster"
    inventory = inventory or Inventory(model)
    if any(low_rank.is_lora(module) for _, module in inventory.modules):
        return "LoRA adapters"
    return weights_obstacle(model, inventory)


def packed_states(
    model: ModelBase, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None
) -> Tensor | None:
    """The last hidden states (tokens, width), float32, of sequences of token ids, one after another.

    They are those of the model without its head, after its final norm. `types`: token type ids, as many as `ids`.
    Without gradients. None if the library cannot run the model (`obstacle`). ValueError: an empty sequence, a token id
    outside the vocabulary, or a sequence that is longer than the table of positions.
    """
    inventory = Inventory(model)
    inventory.fuse_groups()
    if obstacle(model, inventory) is not None:
        return None
    spec = model.spec
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    _check(spec, lengths)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    flat = np.fromiter(itertools.chain.from_iterable(ids), np.int64, int(starts[-1]))
    if flat.size and (flat.min() < 0 or flat.max() >= spec.vocab):
        raise ValueError(
            f"token ids from {flat.min()} to {flat.max()}: the vocabulary has the ids 0 to {spec.vocab - 1}"
        )
    flat_types = None if types is None else _types(types, lengths, spec)
    positions = _positions(spec, flat, starts)
    out = torch.empty((flat.size, spec.width), dtype=torch.float32)
    if not flat.size:
        return out
    tensors = [tensor.detach() for _, _, tensor in inventory.tensors()]
    finish = functools.partial(_round_inputs, model) if input_rounding.wanted(model) else None
    held = weights(model, inventory, tensors, finish)
    relative = _relative_bias(model, int(lengths.max()))
    _run(spec, held, flat, flat_types, positions, starts, relative, out, threads=torch.get_num_threads())
    return out


def _run(
    spec: ArchSpec,
    held: NativeWeights,
    flat: Ints,
    types: Ints | None,
    positions: Ints,
    starts: Ints,
    relative: Tensor | None,
    out: Tensor,
    threads: int,
    peaks: Tensor | None = None,
) -> None:
    """Fill `out` (tokens, width) by the library; `peaks`: see `PackedForward` of packed_forward.hpp."""
    call = PackedForward(
        ids=flat.ctypes.data,
        type_ids=None if types is None else types.ctypes.data,
        positions=positions.ctypes.data,
        starts=starts.ctypes.data,
        out=out.data_ptr(),
        peaks=None if peaks is None else peaks.data_ptr(),
        sequences=len(starts) - 1,
        causal=spec.causal,
        threads=threads,
    )
    if relative is not None:
        call.relative, call.relative_stride = relative.data_ptr(), relative.shape[1]
        call.relative_center = int(np.diff(starts).max())
    run: Any = native.library().mb_forward
    scratch = _scratch(0)
    call.scratch, call.scratch_bytes = scratch.data_ptr(), scratch.numel()
    while (answer := run(held.struct, call)) > 0:
        scratch = _scratch(answer)
        call.scratch, call.scratch_bytes = scratch.data_ptr(), scratch.numel()
    if answer:
        raise ValueError("a token id or a position is outside of its table")


def _round_inputs(model: ModelBase, held: NativeWeights) -> None:
    """Set how inputs are rounded, by the channels that are large for random tokens."""
    spec = model.spec
    learned = spec.position(Learned)
    longest = input_rounding.LENGTH if learned is None else learned.size - learned.offset
    rows = [row[:longest] for row in input_rounding.random_tokens(spec.vocab)]
    starts = np.arange(len(rows) + 1) * len(rows[0])
    flat = np.array(rows, np.int64).reshape(-1)
    most = max(spec.width, spec.mlp.width, spec.attention.heads * spec.attention.head_dim)
    peaks = torch.zeros(spec.layers, len(input_rounding.PRODUCTS), most)
    out = torch.empty((flat.size, spec.width), dtype=torch.float32)
    relative = _relative_bias(model, len(rows[0]))
    # One thread: the peaks of all rows are its own.
    _run(
        spec, held, flat, None, _positions(spec, flat, starts), starts, relative, out, threads=1, peaks=peaks
    )
    held.round_inputs(model, peaks)


def unpadded_states(model: ModelBase, ids_bs: Tensor, mask_bs: Tensor | None) -> Tensor | None:
    """The last hidden states (b, s, w) of a padded batch, in the dtype of the weights, computed without its padding;
    zeros at padding.

    None if the library cannot run the model, or if the mask is not 1 for one run of tokens in each row: then tokens
    between them would have other positions.
    """
    mask = torch.ones_like(ids_bs) if mask_bs is None else mask_bs
    if mask.shape != ids_bs.shape or ids_bs.device.type != "cpu" or not dispatch.readable(ids_bs, mask):
        return None
    real = mask.bool()
    starts = real.int().diff(dim=-1, prepend=torch.zeros_like(ids_bs[:, :1], dtype=torch.int)) == 1
    if not ids_bs.numel() or not (starts.sum(-1) == 1).all():
        return None
    rows = [row[own].tolist() for row, own in zip(ids_bs, real, strict=True)]
    states = packed_states(model, rows)
    if states is None:
        return None
    hidden = torch.zeros((*ids_bs.shape, model.spec.width), dtype=common_dtype(model))
    hidden[real] = states.to(hidden.dtype)
    return hidden


# ---------------------------------------------------------------------------- inputs of a call


def _check(spec: ArchSpec, lengths: Ints) -> None:
    """ValueError for lengths that the model does not support."""
    if lengths.size and not lengths.min():
        raise ValueError(f"sequence {int(lengths.argmin())} is empty: give at least one token")
    learned = spec.position(Learned)
    if learned is not None and lengths.size and lengths.max() > learned.size - learned.offset:
        raise ValueError(
            f"the model has {learned.size - learned.offset} learned positions, but a sequence has {lengths.max()} "
            "tokens: shorten it"
        )


def _types(types: Sequence[Sequence[int]], lengths: Ints, spec: ArchSpec) -> Ints:
    if list(map(len, types)) != lengths.tolist():
        raise ValueError("token type ids: expected one for each token id")
    flat = np.fromiter(itertools.chain.from_iterable(types), np.int64, int(lengths.sum()))
    if flat.size and (flat.min() < 0 or flat.max() >= spec.vocab):
        raise ValueError(
            f"token type ids from {flat.min()} to {flat.max()}: they are ids of the vocabulary of {spec.vocab}"
        )
    return flat


def _positions(spec: ArchSpec, ids: Ints, starts: Ints) -> Ints:
    """The position of each token, as `inputs.prepare` counts it in a row without padding."""
    first = np.repeat(starts[:-1], np.diff(starts))
    learned = spec.position(Learned)
    if learned is None or learned.pad_id is None:
        return np.arange(ids.size) - first + (learned.offset if learned else 0)
    real = ids != learned.pad_id  # a text may contain the padding token
    counted = np.concatenate([np.zeros(1, np.int64), np.cumsum(real)])
    return np.where(real, counted[1:] - counted[first], 0) + learned.offset - 1


def _relative_bias(model: ModelBase, longest: int) -> Tensor | None:
    """The library's table of the biases of the distances -longest to longest; None for a model without relative
    positions."""
    buckets = model.spec.position(Buckets)
    if buckets is None:
        return None
    weight: Tensor = model.at("rel_bias").weight.detach()
    distances = torch.arange(-longest, longest + 1)
    return native_ops.relative_table(
        weight[relative_position_bucket(distances, buckets.count, buckets.max_distance)]
    )


_LOCAL = threading.local()


def _scratch(size: int) -> Tensor:
    """This thread's scratch of at least `size` bytes, kept for later calls, since fresh memory costs page faults."""
    buffer: Tensor | None = getattr(_LOCAL, "buffer", None)
    if buffer is None or buffer.numel() < size:
        buffer = _LOCAL.buffer = torch.empty(size, dtype=torch.uint8)
    return buffer
