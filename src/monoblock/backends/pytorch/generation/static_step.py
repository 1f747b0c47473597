"""A decode step over tensors with fixed addresses, which a CUDA graph can capture and replay.

The step never depends on values on the host: no value is read back, and no shape or branch changes from token to token.
The token's position is a tensor too; the key of each slot and the attention mask are computed from it.

Shape suffixes: b batch, k slots, l positions, g key/value heads, d head width, v vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from monoblock.backends.pytorch import heads
from monoblock.backends.pytorch.base import ModelBase
from monoblock.backends.pytorch.cache import Cache
from monoblock.backends.pytorch.kernels.attention_cuda import WIDEST, kv_splits
from monoblock.backends.pytorch.model import Attention, ForwardContext, run_layers
from monoblock.backends.pytorch.ops import Scope, cos_sin
from monoblock.positions import inverse_frequencies
from monoblock.spec import Alibi, ArchSpec, Learned, Rotary

# Devices on which the Triton kernels compute the attention of one token, if Triton is installed.
TRITON = ("cuda",)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The static sizes of a step; everything else about the sequences is in its tensors.

    `slots` of each layer: `length`, or fewer where a window allows old keys to be overwritten. `padded`: whether rows
    have padding.
    """

    rows: int
    length: int
    slots: tuple[int, ...]
    padded: bool
    dtype: torch.dtype
    device: torch.device


def held_positions(position_1: Tensor, slots: int) -> Tensor:
    """(slots,) the position of the key in each slot of a ring buffer, after the token at `position` was written to slot
    `position % slots`. Empty slots get `position + 1`, which the causal mask hides."""
    slot = torch.arange(slots, device=position_1.device)
    at = position_1 - (position_1 - slot).remainder(slots)
    return torch.where(at < 0, position_1 + 1, at)


@dataclass
class SlotScope(Scope):
    """The attention mask of one token over slots; `valid_bl` is False for padding, by position."""

    in_order: ClassVar[bool] = False

    valid_bl: Tensor | None = None

    @classmethod
    def of(cls, state: StepState) -> SlotScope:
        """For a layer without a window, which keeps all keys."""
        whole = cls(
            index_q=state.position_1,
            index_k=state.position_1,
            causal=True,
            aligned=False,
            slopes_h=state.slopes_h,
            valid_bl=state.valid_bl,
        )
        return whole._over(state.shape.length, None)

    def with_window(self, window: int, kept: int) -> Scope:
        """For a layer with `window` and `kept` slots; cached by these two."""
        if (window, kept) not in self.narrow:
            self.narrow[window, kept] = self._over(kept, window)
        return self.narrow[window, kept]

    def fully_masked(self) -> Tensor | None:
        """None: a new token always attends to itself."""
        return None

    def _over(self, slots: int, window: int | None) -> SlotScope:
        at = held_positions(self.index_q, slots)
        valid = self.valid_bl
        if valid is not None:
            # The position of empty slots may be out of range; it is masked anyway.
            valid = valid.index_select(1, at.clamp(max=valid.shape[1] - 1))
        return replace(self, index_k=at, valid_bk=valid, window=window, memo={}, narrow={})


class RingBuffers(Cache):
    """The slots of all layers, written at a position that is a tensor."""

    def __init__(self, state: StepState) -> None:
        super().__init__()
        self.keys, self.values = state.keys, state.values
        self.slot = {slots: state.position_1.remainder(slots) for slots in set(state.shape.slots)}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        slot = self.slot[keys.shape[2]]
        keys.index_copy_(2, slot, key_states)
        values.index_copy_(2, slot, value_states)
        return keys, values


class StepState:
    """The tensors that a step reads and writes, except the weights: token ids, position, padding mask, keys and values,
    and the constants of the position encodings."""

    def __init__(self, spec: ArchSpec, shape: Shape) -> None:
        self.shape, device = shape, shape.device
        self.ids_b1 = torch.zeros(shape.rows, 1, dtype=torch.int64, device=device)
        self.position_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.positions_b1 = torch.zeros(
            shape.rows if shape.padded else 1, 1, dtype=torch.int64, device=device
        )
        self.valid_bl: Tensor | None = None
        if shape.padded:
            self.valid_bl = torch.ones(shape.rows, shape.length, dtype=torch.bool, device=device)
        att = spec.attention
        sizes = [(shape.rows, att.kv_heads, slots, att.head_dim) for slots in shape.slots]
        self.keys = [torch.zeros(size, dtype=shape.dtype, device=device) for size in sizes]
        self.values = [torch.zeros(size, dtype=shape.dtype, device=device) for size in sizes]
        learned, alibi, rotary = spec.position(Learned), spec.position(Alibi), spec.position(Rotary)
        self.offset = learned.offset if learned else 0
        self.slopes_h: Tensor | None = None
        if alibi:
            self.slopes_h = torch.tensor(alibi.slopes(att.heads), dtype=torch.float32, device=device)
        self.inverse: Tensor | None = None
        self.factor = 1.0
        if rotary:
            inverse, self.factor = inverse_frequencies(rotary)
            self.inverse = torch.tensor(inverse, device=device)[None, None, None]

    def load(self, cache: Cache, mask_bl: Tensor | None) -> None:
        """Copy a cache into the state; `mask_bl` is 0 for padding (None: there is none)."""
        length = cache.get_seq_length()
        for i, slots in enumerate(self.shape.slots):
            kept = min(cache.held(i), slots)
            at = torch.arange(length - kept, length, device=self.shape.device) % slots
            for own, theirs in ((self.keys[i], cache.keys[i]), (self.values[i], cache.values[i])):
                # Keys of an earlier sequence are masked, but 0 * inf would be NaN.
                own.zero_()
                own.index_copy_(2, at, theirs[:, :, cache.held(i) - kept : cache.held(i)])
        self.position_1.fill_(length)
        self.positions_b1.fill_(length + self.offset)
        if self.valid_bl is not None:
            assert mask_bl is not None
            self.valid_bl.fill_(True)
            self.valid_bl[:, :length] = mask_bl != 0
            self.positions_b1.copy_((mask_bl != 0).sum(1, keepdim=True) + self.offset)

    def tokens(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values of the first `length` tokens that a layer still holds, in order."""
        slots = self.shape.slots[layer]
        at = torch.arange(max(0, length - slots), length, device=self.shape.device) % slots
        return self.keys[layer].index_select(2, at), self.values[layer].index_select(2, at)

    def reorder(self, index_b: Tensor) -> None:
        """Reorder the rows: row i becomes the former row `index_b[i]`. The number of rows does not change."""
        rows = [*self.keys, *self.values]
        if self.valid_bl is not None:
            rows += [self.valid_bl, self.positions_b1]
        for tensor in rows:
            tensor.copy_(tensor.index_select(0, index_b))


def static_step(model: Any, state: StepState) -> Tensor:
    """Logits (b, v), float32, for the token after `state.ids_b1`; advances the state's position."""
    x = model.get_input_embeddings()(state.ids_b1)
    scope = SlotScope.of(state)
    context = ForwardContext(
        scope=scope,
        positions_bs=state.positions_b1,
        key_positions_bk=state.positions_b1,
        cache=RingBuffers(state),
    )
    if state.inverse is not None:
        context.cos, context.sin = cos_sin(state.positions_b1, state.inverse, state.factor, x.dtype)
    if _has_kernels(model, state) and x.dtype == state.shape.dtype:
        context.one_token = _one_token(state, context)
    bare = model.bare
    x = bare.embedded(x, context)
    hidden = bare.role("stack")(x, context) if bare.has("stack") else run_layers(bare, x, context)
    scores = heads.logits(model, hidden[:, -1]).float()
    state.position_1.add_(1)
    state.positions_b1.add_(1)
    return scores


def _has_kernels(model: ModelBase, state: StepState) -> bool:
    """Whether triton_step.py's kernels are available and fit the model's options."""
    return (
        state.shape.device.type in TRITON
        and importlib.util.find_spec("triton") is not None
        and model.spec.attention.head_dim <= WIDEST
        and model.config._attn_implementation != "eager"
    )


def _one_token(
    state: StepState, context: ForwardContext
) -> Callable[[Attention, Tensor, Tensor, Tensor], Tensor]:
    """Attention of one token over the state, by the Triton kernels."""
    from monoblock.backends.pytorch.kernels import triton_step

    angles = None if context.cos is None or context.sin is None else (context.cos, context.sin)

    def one_token(layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = state.keys[layer.layer]
        return triton_step.attention(
            *(q, k, v, keys, state.values[layer.layer], state.position_1),
            angles=angles,
            slopes_h=state.slopes_h,
            valid_bl=state.valid_bl,
            window=layer.window,
            scale=layer.kernel.scale,
            softcap=layer.kernel.softcap,
            splits=kv_splits(keys.shape[0] * keys.shape[1], keys.shape[2]),
        )

    return one_token
