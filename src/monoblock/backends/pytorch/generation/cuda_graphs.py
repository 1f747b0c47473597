"""Decoding with CUDA graphs: a step is captured once per model, batch size and length, and replayed for each token.

`GraphDecoder` wraps the decoder of a `generate` call. The inner decoder runs the prompt; its keys and values are then
copied into the state of a static step (static_step.py), whose graph is replayed until the sequences are complete or
longer than its slots. Captured graphs are kept for later calls and released with their model.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from monoblock.backends.pytorch.base import ModelBase
from monoblock.backends.pytorch.cache import Cache, DynamicCache, StaticCache
from monoblock.backends.pytorch.generation.static_step import Shape, StepState, static_step
from monoblock.backends.pytorch.kernels import dispatch
from monoblock.backends.pytorch.model import Attention
from monoblock.backends.pytorch.native_weights import sharding_obstacle
from monoblock.generation.decoder import GenerationPlan

log = logging.getLogger("monoblock")

Replay = Callable[[], Tensor]

# Lengths are powers of two from MIN_LENGTH on, at least ROOM beyond the sequences, so that few graphs serve all
# lengths.
MIN_LENGTH, ROOM = 256, 256
MIN_NEW_TOKENS = 16  # new tokens from which a capture, which costs about five steps, pays off
ALIGN = 64  # the slots of a window are rounded up to a multiple of this, for the kernels
MAX_KEPT = 8  # most recent graphs that are kept per model: lengths up to 32,768 at one batch size
WARMUP_RUNS = 3  # runs before the capture, in which libraries choose and load their kernels


def cuda_graph(run: Callable[[], Tensor], device: torch.device) -> Replay:
    """Capture `run` as a CUDA graph; returns a function that replays it and returns the same output tensor."""
    with torch.cuda.device(device):
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(WARMUP_RUNS):
                run()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate memory during the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = run()

    def replay() -> Tensor:
        with torch.cuda.device(device):
            graph.replay()
        return out

    return replay


CAPTURE: dict[str, Callable[[Callable[[], Tensor], torch.device], Replay]] = {"cuda": cuda_graph}


class CapturedStep:
    """A step's state and its captured graph. It holds no reference to the model, so that it can be freed with it."""

    def __init__(self, model: ModelBase, shape: Shape, weights: Hashable) -> None:
        self.shape, self.weights = shape, weights
        self.state = state = StepState(model.spec, shape)
        self.replay = CAPTURE[shape.device.type](lambda: static_step(model, state), shape.device)

    def __call__(self, ids_b1: Tensor) -> Tensor:
        """Logits (b, v) for the token after these, in new memory."""
        self.state.ids_b1.copy_(ids_b1)
        return self.replay().clone()


_kept: WeakKeyDictionary[nn.Module, list[CapturedStep]] = WeakKeyDictionary()
_lock = threading.Lock()


def take(model: ModelBase, shape: Shape) -> CapturedStep:
    """A captured step for exclusive use: a kept one, if the weights still have the same addresses, else a new one."""
    now = weights(model)
    with _lock:
        kept = _kept.setdefault(model, [])
        kept[:] = [step for step in kept if step.weights == now]
        for step in kept:
            if step.shape == shape:
                kept.remove(step)
                return step
    return CapturedStep(model, shape, now)


def put_back(model: nn.Module, step: CapturedStep) -> None:
    """Keep a captured step for later calls; the oldest beyond MAX_KEPT are released."""
    with _lock:
        kept = _kept.setdefault(model, [])
        kept.append(step)
        del kept[:-MAX_KEPT]


def release(model: nn.Module) -> None:
    """Release the memory of a model's captured steps; the next call captures again."""
    with _lock:
        _kept.pop(model, None)


def weights(model: ModelBase) -> Hashable:
    """Addresses, dtypes and shapes of the weights, and the attention kernels. A graph reads the weights at fixed
    addresses: in-place updates take effect, replaced tensors do not."""
    tensors = [*model.parameters(), *model.buffers()]
    return tuple((x.data_ptr(), x.dtype, x.shape) for x in tensors), *sorted(_kernels(model))


def _kernels(model: ModelBase) -> set[str]:
    return {part.implementation for part in model.modules() if isinstance(part, Attention)}


# ---------------------------------------------------------------------------- which calls


class Decoding(Protocol):
    """The interface of a decoder in the middle of one generation (decoder.py)."""

    cache: Cache | None
    mask: Tensor | None
    positions: Tensor | None
    types: Tensor | None
    wanted: dict[str, bool]

    @property
    def model(self) -> ModelBase:
        """The model that computes the tokens."""
        ...

    @property
    def past_key_values(self) -> Any:
        """The cache, in the form in which it was passed."""
        ...

    def prefill(self, ids_bn: Tensor, mask_bm: Tensor | None) -> Tensor:
        """Process the prompts; logits for the next token."""
        ...

    def step(self, ids_b1: Tensor) -> Tensor:
        """Process one token per row; logits for the next token."""
        ...

    def reorder(self, index_b: Tensor) -> None:
        """Reorder the rows: row i becomes the former row `index_b[i]`."""
        ...


def call_obstacle(decoder: Decoding, plan: GenerationPlan) -> str | None:
    """Why a call cannot decode with CUDA graphs; None if it can: a supported device, a cache that keeps its keys in
    order, no outputs requested except logits, and a model without an obstacle."""
    if (wanted := next((name for name, on in decoder.wanted.items() if on), None)) is not None:
        return f"{wanted}=True"
    if plan.rewinds:
        return "speculative decoding"
    if plan.config.cache_implementation == "dynamic":
        return "cache_implementation='dynamic'"
    if decoder.cache is None:
        return "use_cache=False"
    if type(decoder.cache) not in (DynamicCache, StaticCache):
        return f"a cache of the class {type(decoder.cache).__name__}"
    if decoder.positions is not None or decoder.types is not None:
        return "position_ids or token_type_ids are given"
    if (why := obstacle(decoder.model)) is not None:
        return why
    return f"fewer than {MIN_NEW_TOKENS} new tokens" if plan.new_tokens < MIN_NEW_TOKENS else None


def obstacle(model: ModelBase) -> str | None:
    """Why this model's steps cannot be captured; None if they can. Hooks and modules of other packages may have effects
    that a graph does not replay."""
    device = model.device
    if device.type not in CAPTURE:
        return f"device {device.type}"
    if (why := sharding_obstacle(model)) is not None:
        return why
    if (why := dispatch.spec_obstacle(model.spec) or dispatch.setting_obstacle(device)) is not None:
        return why
    for name, module in model.named_modules():
        known = type(module).__module__.startswith(("torch.nn.modules.", "monoblock"))
        if (why := dispatch.module_obstacle(name, module, known=known, captured=True)) is not None:
            return why
    for name, parameter in model.named_parameters():
        if parameter.device != device:
            return f"{name} is on {parameter.device} and the model on {device}"
    other = _kernels(model) - {"sdpa", "eager", "flex_attention"}
    return f"attn_implementation={other.pop()!r}" if other else None


# ---------------------------------------------------------------------------- the decoder


class GraphDecoder:
    """A decoder that replays captured graphs for the tokens after the prompt. `inner` runs the prompt and holds the
    cache."""

    attentions = hidden_states = None

    def __init__(self, inner: Decoding, plan: GenerationPlan, *, given: bool) -> None:
        """`given`: the cache is the caller's, and contains all tokens after `close`."""
        self.inner, self.plan, self.given = inner, plan, given
        self.running: CapturedStep | None = None
        self.failed = False
        self.length = self.room = 0

    @property
    def past_key_values(self) -> Any:
        """The cache with all tokens, in the form in which it was passed."""
        self.settle()
        return self.inner.past_key_values

    def prefill(self, ids_bn: Tensor, mask_bm: Tensor | None) -> Tensor:
        """Process the prompts; logits for the next token."""
        return self.inner.prefill(ids_bn, mask_bm)

    def step(self, ids_b1: Tensor) -> Tensor:
        """Process one token per row; logits for the next token."""
        if self.running is not None and self.length == self.room:
            self.settle()
        if self.running is None:
            self._begin()
        if self.running is None:
            return self.inner.step(ids_b1)
        self.length += 1
        return self.running(ids_b1)

    def reorder(self, index_b: Tensor) -> None:
        """Reorder the rows: row i becomes the former row `index_b[i]`."""
        if self.running is not None and len(index_b) == self.running.shape.rows:
            self.running.state.reorder(index_b)
            return
        self.settle()
        self.inner.reorder(index_b)

    def close(self) -> None:
        """End the call: put the captured step back, and write all tokens to a given cache."""
        if self.given:
            self.settle()
        elif self.running is not None:
            put_back(self.inner.model, self.running)
            self.running = None

    # ------------------------------------------------------------------ between cache and graph

    def _begin(self) -> None:
        """Move the cache into a captured step with room for more tokens. Does nothing if the cache is full (`inner`
        raises the error) or the capture fails."""
        cache = self.inner.cache
        assert cache is not None
        self.length = cache.get_seq_length()
        limit = cache.get_max_cache_shape()
        if self.failed or (limit is not None and self.length >= limit):
            return
        try:
            running = take(self.inner.model, self._shape(limit))
        except Exception as error:  # of any library: decoding without a graph may still work
            self.failed = True
            log.warning(
                "%s: decoding continues without CUDA graphs, because the capture failed: %s",
                self.inner.model.row.name,
                error,
            )
            return
        running.state.load(cache, self.inner.mask)
        if isinstance(cache, DynamicCache):
            # To free memory; `settle` restores the tensors.
            for tensors in (cache.keys, cache.values):
                tensors[:] = [x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in tensors]
        self.running = running
        self.room = min(running.shape.length, limit or running.shape.length)

    def _shape(self, limit: int | None) -> Shape:
        """The shape for the current length and some more, as far as the call can use it."""
        cache = self.inner.cache
        assert cache is not None
        needed = max(self.length + 1, min(self.length + ROOM, self.plan.max_length, limit or 1 << 62))
        length = max(MIN_LENGTH, 1 << (needed - 1).bit_length())
        layers = self.inner.model.spec.layers
        windows = cache.windows if isinstance(cache, DynamicCache) else ()
        # A layer's keys may be overwritten only if the cache would drop them as well.
        slots = [_slots(window, length) for window in windows or (None,) * layers]
        first = cache.keys[0]
        return Shape(
            rows=first.shape[0],
            length=length,
            slots=tuple(slots),
            padded=self.inner.mask is not None,
            dtype=first.dtype,
            device=first.device,
        )

    def settle(self) -> None:
        """Copy all tokens back into the cache and the mask, and put the captured step back."""
        if (running := self.running) is None:
            return
        cache, mask, state = self.inner.cache, self.inner.mask, running.state
        assert cache is not None
        for i in range(len(cache.keys)):
            keys, values = state.tokens(i, self.length)
            if isinstance(cache, DynamicCache):
                cache.keys[i], cache.values[i] = keys, values
                cache.lengths[i] = self.length
                cache.dropped[i] = self.length - keys.shape[2]
            else:
                cache.lengths[i] = 0
                cache.update(keys, values, i)
        if mask is not None and state.valid_bl is not None:
            self.inner.mask = state.valid_bl[:, : self.length].to(mask.dtype)
        self.running = None
        put_back(self.inner.model, running)


def _slots(window: int | None, length: int) -> int:
    """The number of slots of a layer: its window, rounded up."""
    return length if window is None else min(length, -(-window // ALIGN) * ALIGN)
