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
from monoblock.generation.decoder import GenerationPlan

log = logging.getLogger("monoblock")

Replay = Callable[[], Tensor]

# Lengths are powers of two from MIN_LENGTH on, at least ROOM beyond the text, so that few recordings serve all texts.
MIN_LENGTH, ROOM = 256, 256
MIN_NEW_TOKENS = 16  # new tokens from which on a recording, which costs about five steps, is made
ALIGN = 64  # the slots of a window are a multiple of this, as the kernels like it
MAX_KEPT = 8  # recordings that a model keeps, the latest: lengths up to 32,768 at one batch size
WARMUP_RUNS = 3  # runs before the recording: libraries choose and load their kernels in the first ones


def cuda_graph(run: Callable[[], Tensor], device: torch.device) -> Replay:
    """What plays the CUDA kernels of `run` again, on the same memory; gives the tensor that `run` gave."""
    with torch.cuda.device(device):
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(WARMUP_RUNS):
                run()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on allocating while this one records.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = run()

    def replay() -> Tensor:
        with torch.cuda.device(device):
            graph.replay()
        return out

    return replay


CAPTURE: dict[str, Callable[[Callable[[], Tensor], torch.device], Replay]] = {"cuda": cuda_graph}


class CapturedStep:
    """A step's state and recording. It holds no reference to the model, with which it is released."""

    def __init__(self, model: ModelBase, shape: Shape, weights: Hashable) -> None:
        self.shape, self.weights = shape, weights
        self.state = state = StepState(model.spec, shape)
        self.replay = CAPTURE[shape.device.type](lambda: static_step(model, state), shape.device)

    def __call__(self, ids_b1: Tensor) -> Tensor:
        """Scores (b, v) of the token after these, in memory of their own."""
        self.state.ids_b1.copy_(ids_b1)
        return self.replay().clone()


_kept: WeakKeyDictionary[nn.Module, list[CapturedStep]] = WeakKeyDictionary()
_lock = threading.Lock()


def take(model: ModelBase, shape: Shape) -> CapturedStep:
    """A recording that nobody else uses: a kept one, if the weights lie where they lay then, else a new one."""
    now = weights(model)
    with _lock:
        kept = _kept.setdefault(model, [])
        kept[:] = [recorded for recorded in kept if recorded.weights == now]
        for recorded in kept:
            if recorded.shape == shape:
                kept.remove(recorded)
                return recorded
    return CapturedStep(model, shape, now)


def put_back(model: nn.Module, recorded: CapturedStep) -> None:
    """Keep a recording for the next call; the oldest beyond MAX_KEPT is released."""
    with _lock:
        kept = _kept.setdefault(model, [])
        kept.append(recorded)
        del kept[:-MAX_KEPT]


def release(model: nn.Module) -> None:
    """Release the memory of a model's recordings; the next call makes new ones."""
    with _lock:
        _kept.pop(model, None)


def weights(model: ModelBase) -> Hashable:
    """Where the weights lie and what they are. A recording reads them there: new numbers in the same place are seen,
    tensors in another place are not."""
    tensors = [*model.parameters(), *model.buffers()]
    return tuple((x.data_ptr(), x.dtype, x.shape) for x in tensors), *sorted(_kernels(model))


def _kernels(model: ModelBase) -> set[str]:
    return {part.implementation for part in model.modules() if isinstance(part, Attention)}


# ---------------------------------------------------------------------------- which calls


class Decoding(Protocol):
    """What is asked here of a decoder in the middle of one generation (decoder.py)."""

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
        """The cache, in the form in which it came."""
        ...

    def prefill(self, ids_bn: Tensor, mask_bm: Tensor | None) -> Tensor:
        """Take the prompts."""
        ...

    def step(self, ids_b1: Tensor) -> Tensor:
        """Take one token for each row."""
        ...

    def reorder(self, index_b: Tensor) -> None:
        """Row i becomes what row index[i] was."""
        ...


def call_obstacle(decoder: Decoding, plan: GenerationPlan) -> str | None:
    """Why a call's tokens cannot come from a captured graph; None if they can: a device that captures, a cache that
    keeps its keys in order, nothing asked for beside scores, and a model without an obstacle."""
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
    """Why this model's steps cannot be captured; None if they can. Hooks and modules of other packages may do what a
    graph cannot repeat."""
    device = model.device
    if device.type not in CAPTURE:
        return f"device {device.type}"
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


# ---------------------------------------------------------------------------- in the place of a decoder


class GraphDecoder:
    """A decoder whose tokens after the prompt come from recordings. `inner` runs the prompt and keeps the cache."""

    attentions = hidden_states = None

    def __init__(self, inner: Decoding, plan: GenerationPlan, *, given: bool) -> None:
        """`given`: the cache is the caller's, who finds all tokens in it after `close`."""
        self.inner, self.plan, self.given = inner, plan, given
        self.running: CapturedStep | None = None
        self.failed = False
        self.place = self.room = 0

    @property
    def past_key_values(self) -> Any:
        """The cache with all tokens, in the form in which it came."""
        self.settle()
        return self.inner.past_key_values

    def prefill(self, ids_bn: Tensor, mask_bm: Tensor | None) -> Tensor:
        """Take the prompts."""
        return self.inner.prefill(ids_bn, mask_bm)

    def step(self, ids_b1: Tensor) -> Tensor:
        """Take one token for each row."""
        if self.running is not None and self.place == self.room:
            self.settle()
        if self.running is None:
            self._begin()
        if self.running is None:
            return self.inner.step(ids_b1)
        self.place += 1
        return self.running(ids_b1)

    def reorder(self, index_b: Tensor) -> None:
        """Row i becomes what row index[i] was."""
        if self.running is not None and len(index_b) == self.running.shape.rows:
            self.running.state.reorder(index_b)
            return
        self.settle()
        self.inner.reorder(index_b)

    def close(self) -> None:
        """The call is over: the recording is free for the next, and a cache that was given holds all tokens."""
        if self.given:
            self.settle()
        elif self.running is not None:
            put_back(self.inner.model, self.running)
            self.running = None

    # ------------------------------------------------------------------ between cache and recording

    def _begin(self) -> None:
        """Move what the cache holds into a recording with room for more; none where the cache is full (which `inner`
        says) or recording fails."""
        cache = self.inner.cache
        assert cache is not None
        self.place = cache.get_seq_length()
        limit = cache.get_max_cache_shape()
        if self.failed or (limit is not None and self.place >= limit):
            return
        try:
            running = take(self.inner.model, self._shape(limit))
        except (
            Exception
        ) as error:  # each library has errors of its own, and the plain path needs none of them
            self.failed = True
            log.warning(
                "%s: decoding goes on without CUDA graphs, because recording one failed: %s",
                self.inner.model.row.name,
                error,
            )
            return
        running.state.load(cache, self.inner.mask)
        if isinstance(cache, DynamicCache):
            # It would be a second copy; `settle` puts everything back.
            for tensors in (cache.keys, cache.values):
                tensors[:] = [x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in tensors]
        self.running = running
        self.room = min(running.shape.length, limit or running.shape.length)

    def _shape(self, limit: int | None) -> Shape:
        """The shape for the text so far and some more, where the call has as much to come."""
        cache = self.inner.cache
        assert cache is not None
        needed = max(self.place + 1, min(self.place + ROOM, self.plan.max_length, limit or 1 << 62))
        length = max(MIN_LENGTH, 1 << (needed - 1).bit_length())
        layers = self.inner.model.spec.layers
        windows = cache.windows if isinstance(cache, DynamicCache) else ()
        # A layer's keys may be overwritten only where the cache would drop them too.
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
        """Put all tokens back into the cache and the mask, and give the recording back."""
        if (running := self.running) is None:
            return
        cache, mask, state = self.inner.cache, self.inner.mask, running.state
        assert cache is not None
        for i in range(len(cache.keys)):
            keys, values = state.tokens(i, self.place)
            if isinstance(cache, DynamicCache):
                cache.keys[i], cache.values[i] = keys, values
                cache.lengths[i] = self.place
                cache.dropped[i] = self.place - keys.shape[2]
            else:
                cache.lengths[i] = 0
                cache.update(keys, values, i)
        if mask is not None and state.valid_bl is not None:
            self.inner.mask = state.valid_bl[:, : self.place].to(mask.dtype)
        self.running = None
        put_back(self.inner.model, running)


def _slots(window: int | None, length: int) -> int:
    """How many slots a layer needs: its window's keys, rounded up."""
    return length if window is None else min(length, -(-window // ALIGN) * ALIGN)
