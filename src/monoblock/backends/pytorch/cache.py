"""KV caches: one that grows, and one that is allocated once. Both have the methods of transformers' caches.

Layer tensors are (batch, kv_heads, tokens, head_dim).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Legacy = tuple[tuple[Tensor, Tensor], ...]


class Cache:
    """The cached keys and values of each layer, in buffers that may have spare room."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.lengths: list[int] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append keys and values (b, g, n, d) to layer `layer_idx`; returns the layer's keys and values that are
        visible to the new tokens."""
        if layer_idx == len(self.keys):
            self._begin(key_states, value_states)
        count = key_states.shape[2]
        if self.lengths[layer_idx] == 0 and self.keys[layer_idx] is key_states:
            self.advance(layer_idx, count)
            return key_states, value_states
        start = self.reserve(layer_idx, count)
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[:, :, start : start + count] = key_states
        values[:, :, start : start + count] = value_states
        self.advance(layer_idx, count)
        visible = slice(self._oldest(layer_idx, start), start + count)
        return keys[:, :, visible], values[:, :, visible]

    def reserve(self, layer_idx: int, count: int) -> int:
        """Make room for `count` more tokens in a layer's buffers; the slot of the first of them. Call `advance` after
        writing them."""
        held = self.held(layer_idx)
        self._make_room(layer_idx, held, held + count)
        return held

    def advance(self, layer_idx: int, count: int) -> None:
        """Count `count` more tokens in a layer; keys that are outside every later token's window may be dropped."""
        self.lengths[layer_idx] += count

    def _oldest(self, layer_idx: int, start: int) -> int:
        """The slot of the first token that is visible to tokens from slot `start` on."""
        del layer_idx, start
        return 0

    def _begin(self, keys: Tensor, values: Tensor) -> None:
        raise NotImplementedError

    def _make_room(self, layer_idx: int, past: int, total: int) -> None:
        raise NotImplementedError

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens processed by that layer."""
        return self.lengths[layer_idx] if layer_idx < len(self.lengths) else 0

    def get_max_cache_shape(self) -> int | None:
        """The capacity in tokens; None: no limit."""
        return None

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` tokens; a negative number drops that many from the end."""
        length = self.get_seq_length()
        kept = max(0, length + max_length) if max_length < 0 else min(max_length, length)
        self.lengths = [kept] * len(self.lengths)

    def reset(self) -> None:
        """Remove all tokens."""
        self.lengths = [0] * len(self.lengths)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows: row i becomes the former row `beam_idx[i]`."""
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
        """A tuple (keys, values) for each layer."""
        held = [self.held(i) for i in range(len(self))]
        return tuple((k[:, :, :n], v[:, :, :n]) for k, v, n in zip(self.keys, self.values, held, strict=True))

    def held(self, layer_idx: int) -> int:
        """The number of tokens stored in that layer: all, or the last ones of a windowed layer."""
        return self.lengths[layer_idx]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        return self.to_legacy_cache()[layer_idx]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.to_legacy_cache())


class DynamicCache(Cache):
    """A cache that grows, by an amortised reallocation, so that the cost of a token does not grow with the length.

    `ddp_cache_data`: (keys, values) of each layer to begin with. `config`: a model's config or spec; layers whose
    window it gives keep only the tokens of the window and `SLACK` more.
    """

    # Tokens that a layer keeps beyond its window, so that a few can be cropped.
    SLACK = 64

    def __init__(
        self, ddp_cache_data: Sequence[tuple[Tensor, Tensor]] | None = None, config: Any = None
    ) -> None:
        super().__init__()
        spec = config.to_spec() if hasattr(config, "to_spec") else config
        self.windows: tuple[int | None, ...] = spec.windows if spec is not None else ()
        self.dropped: list[int] = []
        for i, (keys, values) in enumerate(ddp_cache_data or ()):
            self.update(keys, values, i)

    @classmethod
    def from_legacy_cache(
        cls, past_key_values: Sequence[tuple[Tensor, Tensor]] | None = None
    ) -> DynamicCache:
        """A cache that begins with (keys, values) of each layer, (batch, kv_heads, tokens, head_dim)."""
        return cls(past_key_values)

    def window(self, layer_idx: int) -> int | None:
        """The window of that layer; None: all keys are visible."""
        return self.windows[layer_idx] if layer_idx < len(self.windows) else None

    def advance(self, layer_idx: int, count: int) -> None:
        super().advance(layer_idx, count)
        if (window := self.window(layer_idx)) is None:
            return
        held, kept = self.held(layer_idx), window - 1 + self.SLACK
        if held > 2 * kept:
            for tensors in (self.keys, self.values):
                tensors[layer_idx] = tensors[layer_idx][:, :, held - kept : held].clone()
            self.dropped[layer_idx] = self.lengths[layer_idx] - kept

    def _oldest(self, layer_idx: int, start: int) -> int:
        window = self.window(layer_idx)
        return 0 if window is None else max(0, start - window + 1)

    def crop(self, max_length: int) -> None:
        before = self.get_seq_length()
        super().crop(max_length)
        after = self.get_seq_length()
        for dropped, window in zip(self.dropped, self.windows, strict=False):
            if dropped and window is not None and after - dropped < window - 1:
                self.lengths = [before] * len(self.lengths)
                raise ValueError(
                    f"a windowed layer has dropped the first {dropped} tokens: it cannot go back to {after} tokens"
                )

    def reset(self) -> None:
        super().reset()
        self.dropped = [0] * len(self.dropped)

    def held(self, layer_idx: int) -> int:
        return self.lengths[layer_idx] - self.dropped[layer_idx]

    def _begin(self, keys: Tensor, values: Tensor) -> None:
        for tensors, first in ((self.keys, keys), (self.values, values)):
            # New memory with spare room: views would keep the memory of the fused projection alive, queries included.
            grows = torch.is_grad_enabled() and first.requires_grad
            room = (*first.shape[:2], first.shape[2] + self.SLACK, first.shape[3])
            tensors.append(first if grows else first.new_empty(room))
        self.lengths.append(0)
        self.dropped.append(0)

    def _make_room(self, layer_idx: int, past: int, total: int) -> None:
        """Ensure room for `total` tokens; also reallocates a buffer that is part of an autograd graph."""
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
    """A cache of `max_cache_len` tokens, allocated at the first call, with fixed addresses."""

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
                f"the static cache has room for {self.max_cache_len} tokens: {past} are cached and the input has "
                f"{total - past}; make it with a larger max_cache_len"
            )


def from_tuples(past: Sequence[tuple[Tensor, Tensor]], batch: int) -> tuple[DynamicCache, str]:
    """A cache from one of the two tuple formats, and the name of the format.

    "heads": keys and values (batch, heads, tokens, head_dim). "folded", of earlier versions: keys (batch * heads,
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
    """The cache in a tuple format (see `from_tuples`)."""
    layers = cache.to_legacy_cache()
    if form == "heads":
        return layers
    return tuple((k.flatten(0, 1).mT, v.flatten(0, 1)) for k, v in layers)
