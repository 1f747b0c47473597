"""Key/value caches: one that grows, and one that is allocated once. Both have the hub's methods.

Layer tensors are (batch, kv_heads, tokens, head_dim).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Legacy = tuple[tuple[Tensor, Tensor], ...]


class Cache:
    """The keys and values of the tokens that a model has seen, layer by layer, in buffers that may be longer."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.lengths: list[int] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append (b, g, n, d) keys and values of layer `layer_idx`; all keys and values of that layer."""
        if layer_idx == len(self.keys):
            self._begin(key_states, value_states)
        past = self.lengths[layer_idx]
        total = past + key_states.shape[2]
        if past == 0 and self.keys[layer_idx] is key_states:
            self.lengths[layer_idx] = total
            return key_states, value_states
        self._make_room(layer_idx, past, total)
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[:, :, past:total] = key_states
        values[:, :, past:total] = value_states
        self.lengths[layer_idx] = total
        return keys[:, :, :total], values[:, :, :total]

    def _begin(self, keys: Tensor, values: Tensor) -> None:
        raise NotImplementedError

    def _make_room(self, layer_idx: int, past: int, total: int) -> None:
        raise NotImplementedError

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens that layer holds."""
        return self.lengths[layer_idx] if layer_idx < len(self.lengths) else 0

    def get_max_cache_shape(self) -> int | None:
        """How many tokens fit; None: no limit."""
        return None

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` tokens; a negative number drops that many from the end."""
        length = self.get_seq_length()
        kept = max(0, length + max_length) if max_length < 0 else min(max_length, length)
        self.lengths = [kept] * len(self.lengths)

    def reset(self) -> None:
        """Forget all tokens."""
        self.lengths = [0] * len(self.lengths)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i what row `beam_idx[i]` was."""
        for tensors in (self.keys, self.values):
            tensors[:] = [tensor.index_select(0, beam_idx.to(tensor.device)) for tensor in tensors]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        for tensors in (self.keys, self.values):
            tensors[:] = [tensor.repeat_interleave(repeats, dim=0) for tensor in tensors]

    def to_legacy_cache(self) -> Legacy:
        """For each layer a tuple of the keys and the values of the tokens seen so far."""
        layers = zip(self.keys, self.values, self.lengths, strict=True)
        return tuple((k[:, :, :length], v[:, :, :length]) for k, v, length in layers)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        return self.to_legacy_cache()[layer_idx]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.to_legacy_cache())


class DynamicCache(Cache):
    """A cache that grows; room is made in steps, so that the cost of a token does not grow with the text.

    `ddp_cache_data`: (keys, values) of each layer to begin with. `config` stands in the hub's signature; the
    cache learns its sizes from the first tokens.
    """

    def __init__(
        self, ddp_cache_data: Sequence[tuple[Tensor, Tensor]] | None = None, config: Any = None
    ) -> None:
        super().__init__()
        self.config = config
        for i, (keys, values) in enumerate(ddp_cache_data or ()):
            self.update(keys, values, i)

    @classmethod
    def from_legacy_cache(
        cls, past_key_values: Sequence[tuple[Tensor, Tensor]] | None = None
    ) -> DynamicCache:
        """A cache that begins with (keys, values) of each layer, (batch, kv_heads, tokens, head_dim)."""
        return cls(past_key_values)

    def _begin(self, keys: Tensor, values: Tensor) -> None:
        self.keys.append(keys)
        self.values.append(values)
        self.lengths.append(0)

    def _make_room(self, layer_idx: int, past: int, total: int) -> None:
        """A buffer that holds `total` tokens; a new one as well where the old one is part of a gradient's graph."""
        full = total > self.keys[layer_idx].shape[2]
        if not full and not (torch.is_grad_enabled() and self.keys[layer_idx].requires_grad):
            return
        room = max(total, past + max(64, past // 4)) if full else self.keys[layer_idx].shape[2]
        for tensors in (self.keys, self.values):
            old = tensors[layer_idx]
            new = old.new_zeros(*old.shape[:2], room, old.shape[3])
            new[:, :, :past] = old[:, :, :past]
            tensors[layer_idx] = new


class StaticCache(Cache):
    """A cache of `max_cache_len` tokens, allocated at the first call and never moved again."""

    def __init__(self, config: Any = None, max_cache_len: int = 0) -> None:
        super().__init__()
        if max_cache_len < 1:
            raise ValueError(f"StaticCache needs max_cache_len of at least 1 token, got {max_cache_len}")
        self.config = config
        self.max_cache_len = max_cache_len

    def get_max_cache_shape(self) -> int | None:
        return self.max_cache_len

    def _begin(self, keys: Tensor, values: Tensor) -> None:
        for tensors, new in ((self.keys, keys), (self.values, values)):
            tensors.append(new.new_zeros(*new.shape[:2], self.max_cache_len, new.shape[3]))
        self.lengths.append(0)

    def _make_room(self, layer_idx: int, past: int, total: int) -> None:
        _ = layer_idx
        if total > self.max_cache_len:
            raise ValueError(
                f"the static cache holds {self.max_cache_len} tokens: {past} are in it and {total - past} more came; "
                "make it with a larger max_cache_len"
            )


def from_tuples(past: Sequence[tuple[Tensor, Tensor]], batch: int) -> tuple[DynamicCache, str]:
    """A cache from either of the old tuple forms, and which form it was.

    "heads": keys and values (batch, heads, tokens, head_dim). "folded", of older pages: keys (batch * heads,
    head_dim, tokens), values (batch * heads, tokens, head_dim).
    """
    first = past[0][0]
    if first.dim() == 4:
        return DynamicCache(past), "heads"
    if first.dim() != 3 or first.shape[0] % batch:
        raise ValueError(
            "past_key_values must hold keys of (batch, heads, tokens, head_dim) or (batch * heads, head_dim, "
            f"tokens), got {tuple(first.shape)} for a batch of {batch}"
        )
    return DynamicCache(
        [(k.mT.unflatten(0, (batch, -1)), v.unflatten(0, (batch, -1))) for k, v in past]
    ), "folded"


def to_tuples(cache: Cache, form: str) -> Legacy:
    """The cache in the tuple form that it came in."""
    layers = cache.to_legacy_cache()
    if form == "heads":
        return layers
    return tuple((k.flatten(0, 1).mT, v.flatten(0, 1)) for k, v in layers)
