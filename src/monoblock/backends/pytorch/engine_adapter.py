"""The steps of an engine on PyTorch: the native library over a paged cache, or the model's modules.

The native runner computes the tokens of all sequences at once, with float32 activations; a token's scores do not depend
on the other sequences, to the bit. Where the library cannot run a model, the modules compute one sequence at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monoblock import native
from monoblock.backends.pytorch import batched_step
from monoblock.backends.pytorch.arrays import TorchOps
from monoblock.backends.pytorch.cache import DynamicCache
from monoblock.backends.pytorch.kernels import dispatch
from monoblock.backends.pytorch.native_weights import (
    Inventory,
    common_dtype,
    library_obstacle,
    speed_obstacle,
    weights,
    weights_obstacle,
)
from monoblock.generation.arrays import ArrayOps
from monoblock.generation.batches import BLOCK, BatchRunner, EmbeddedImages, SequenceChunk
from monoblock.generation.limits import host_memory
from monoblock.native.abi import PagedStep
from monoblock.positions import is_dynamic
from monoblock.spec import ArchSpec, Learned, Rotary

FREE_SHARE = 4  # by default the cache takes a quarter of the available memory


def placement(device: str) -> dict[str, Any]:
    """The arguments of `from_pretrained` that put a model on a device; "auto": a GPU if there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return {} if device == "cpu" else {"device_map": device}


def runner(model: Any, cache_memory: int | None, max_length: int | None = None) -> BatchRunner:
    """The runner of a model that generates.

    `cache_memory`: bytes of the KV caches, None: a quarter of the memory that is available; `max_length`: tokens of a
    sequence at most.

    ValueError: a model that does not generate, or memory for less than one block.
    """
    model.eval()
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} does not generate text")
    if model.tensor_group is not None:
        raise ValueError(
            "a model with tp_plan has an engine only by `monoblock serve --tensor-parallel` or "
            "LLM(tensor_parallel_size=), which start its processes"
        )
    blocks = cache_blocks(model, cache_memory)
    why = obstacle(model, max_length)
    return ModuleRunner(model, blocks, why) if why is not None else NativeRunner(model, blocks)


def obstacle(model: Any, max_length: int | None = None) -> str | None:
    """Why the native library cannot run an engine's steps for this model; None if it can. `max_length`: as in
    `runner`."""
    if (why := library_obstacle(model)) is not None:
        return why
    if (why := _spec_obstacle(model.spec, max_length)) is not None:
        return why
    inventory = Inventory(model)
    inventory.fuse_groups()
    return weights_obstacle(model, inventory) or speed_obstacle(model, inventory)


def _spec_obstacle(spec: ArchSpec, max_length: int | None) -> str | None:
    rotary = spec.position(Rotary)
    if rotary is not None and rotary.scaling is not None and is_dynamic(rotary):
        if max_length is not None and max_length <= rotary.scaling.original_length:
            return None  # it has no effect
        return (
            f"{dispatch.spec_obstacle(spec)}: set max_model_len to at most {rotary.scaling.original_length}"
        )
    return dispatch.spec_obstacle(spec)


def block_bytes(spec: ArchSpec, itemsize: int) -> int:
    """Bytes of a block of the cache, of all layers."""
    att = spec.attention
    padded = -(-att.head_dim // 16) * 16
    return spec.layers * att.kv_heads * (att.head_dim + padded) * BLOCK * itemsize


def cache_blocks(model: Any, memory: int | None, share: int = FREE_SHARE) -> int:
    """The number of blocks of the cache in so many bytes; None: in 1 / `share` of the memory that is available.
    ValueError if not even one fits."""
    size = block_bytes(model.spec, model.dtype.itemsize)
    if memory is None:
        memory = _available(model.device) // share
    if memory < size:
        raise ValueError(
            f"cache_memory={memory} bytes: a block of {BLOCK} tokens takes {size} bytes; give more memory"
        )
    return min(memory // size, 2**31 - 1)


def _available(device: torch.device) -> int:
    """Bytes of memory that are available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return (host_memory() or 8 << 30) // 2


class _Runner:
    """What the runners of one process share."""

    model: Any
    failure: BaseException | None = None

    def watch(self, told: Callable[[], None]) -> None:
        """Nothing: a step may fail, but not the runner."""

    def close(self) -> None:
        """Nothing: the memory is freed with the runner."""

    def embed_images(self, inputs: dict[str, Any]) -> EmbeddedImages:
        """The embeddings of the images of a processor's output for one text; see `BatchRunner`."""
        return embed_images(self.model, inputs)


def embed_images(model: Any, inputs: dict[str, Any]) -> EmbeddedImages:
    """The embeddings of the images of a processor's output for one text."""
    ids = torch.as_tensor(inputs["input_ids"])
    given = {name: value for name, value in inputs.items() if "image" in name or "pixel" in name}
    with torch.inference_mode():
        plain = model.get_input_embeddings()(ids.to(model.device))
        embeds = model.embed(ids.to(model.device), given)
    changed = (embeds != plain).any(-1)[0]
    rows = torch.where(changed, changed.cumsum(0) - 1, -1)
    kept = embeds[0][changed].float().cpu().contiguous()
    return EmbeddedImages(
        tokens=ids[0].tolist(),
        embeds=kept,
        rows=rows.tolist(),
        digest=hashlib.sha256(kept.numpy().tobytes()).digest(),
    )


class NativeRunner(_Runner):
    """All sequences of a step in one call of the native library."""

    divides = drafts = True
    why: str | None = None

    def __init__(self, model: Any, blocks: int) -> None:
        self.model, self.blocks = model, blocks
        self.spec: ArchSpec = model.spec
        inventory = Inventory(model)
        inventory.fuse_groups()
        # References to the tensors, so that the memory that the structures point to is not freed.
        self._tensors = [tensor.detach() for _, _, tensor in inventory.tensors()]
        self._weights = weights(model, inventory, self._tensors)
        self.ops: ArrayOps = TorchOps()
        self.vocab = self._weights.vocab
        self._run = native.library().mb_paged_step
        bf16 = common_dtype(model) == torch.bfloat16
        size = block_bytes(self.spec, 1) * blocks
        # NumPy's zeros, unlike PyTorch's, are pages of the system, which take memory when they are first written.
        self._cache = np.zeros(size, np.uint16 if bf16 else np.float32)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._call = PagedStep(cache=self._cache.ctypes.data, blocks=blocks, cache_bf16=bf16)
        learned = self.spec.position(Learned)
        self._offset = learned.offset if learned else 0

    def run(self, chunks: Sequence[SequenceChunk]) -> Tensor:
        """Compute these tokens; see `BatchRunner`."""
        counts = np.fromiter((len(chunk.tokens) for chunk in chunks), np.int64, len(chunks))
        past = np.fromiter((chunk.past for chunk in chunks), np.int64, len(chunks))
        wanted = np.fromiter((chunk.wanted for chunk in chunks), np.int64, len(chunks))
        starts = np.zeros(len(chunks) + 1, np.int64)
        np.cumsum(counts, out=starts[1:])
        total = int(starts[-1])
        ids = np.fromiter(itertools.chain.from_iterable(chunk.tokens for chunk in chunks), np.int64, total)
        index = np.arange(total) - np.repeat(starts[:-1] - past, counts)
        positions = index + self._offset
        tables = np.zeros((len(chunks), max(len(chunk.table) for chunk in chunks)), np.int32)
        for row, chunk in zip(tables, chunks, strict=True):
            row[: len(chunk.table)] = chunk.table
        outputs = np.concatenate(
            [np.arange(end - n, end) for end, n in zip(starts[1:], wanted, strict=True)] or [starts[:0]]
        ).astype(np.int64)
        logits = torch.empty((len(outputs), self.vocab), dtype=torch.float32)
        call = self._call
        call.ids, call.positions, call.starts = ids.ctypes.data, positions.ctypes.data, starts.ctypes.data
        call.past, call.tables, call.wanted = past.ctypes.data, tables.ctypes.data, outputs.ctypes.data
        call.logits, call.sequences, call.outputs = logits.data_ptr(), len(chunks), len(outputs)
        call.table_stride, call.threads = tables.shape[1], torch.get_num_threads()
        embeds, rows = self._embedded(chunks, starts)
        call.embeds = None if embeds is None else embeds.data_ptr()
        call.embed_rows = None if rows is None else rows.ctypes.data
        while (answer := self._run(self._weights.struct, call)) > 0:
            self._scratch = torch.empty(answer + answer // 4, dtype=torch.uint8)
            call.scratch, call.scratch_bytes = self._scratch.data_ptr(), self._scratch.numel()
        if answer:
            raise ValueError("a token id, a position or a block is outside of its table")
        return logits

    @staticmethod
    def _embedded(
        chunks: Sequence[SequenceChunk], starts: np.ndarray[Any, Any]
    ) -> tuple[Tensor | None, np.ndarray[Any, Any] | None]:
        """The embeddings of all images of these tokens, and a row of them for each token, or -1."""
        if not any(chunk.images for chunk in chunks):
            return None, None
        rows, parts, before = np.full(int(starts[-1]), -1, np.int64), list[Tensor](), 0
        for start, chunk in zip(starts, chunks, strict=False):
            if chunk.images is None:
                continue
            own = np.asarray(chunk.images.rows[chunk.past : chunk.past + len(chunk.tokens)], np.int64)
            rows[start : start + len(own)] = np.where(own >= 0, own + before, -1)
            parts.append(chunk.images.embeds)
            before += len(chunk.images.embeds)
        return torch.cat(parts), rows

    def drop(self, key: int) -> None:
        """Nothing: the engine frees the blocks."""


class ModuleRunner(_Runner):
    """The model's modules, one sequence at a time, each with a cache of its own; or (`batched`) all sequences in one
    pass, if the model can, so that a sequence's scores may depend on the others by rounding."""

    divides = drafts = False

    def __init__(self, model: Any, blocks: int, why: str, *, batched: bool = False) -> None:
        self.model, self.blocks = model, blocks
        self.why: str | None = why
        self._batched = batched and batched_step.obstacle(model) is None
        self.ops: ArrayOps = TorchOps(model.device)
        self.vocab: int = model.spec.vocab
        self._caches: dict[int, DynamicCache] = {}

    def run(self, chunks: Sequence[SequenceChunk]) -> Tensor:
        """Compute these tokens; see `BatchRunner`."""
        with torch.inference_mode():
            if self._batched:
                return batched_step.scores(self.model, chunks, [self._cache(chunk) for chunk in chunks])
            return torch.cat([scores for chunk in chunks for scores in self._scores(chunk)])

    def _cache(self, chunk: SequenceChunk) -> DynamicCache:
        """The sequence's cache, with the tokens before the chunk."""
        cache = self._caches.get(chunk.key)
        if cache is None or not chunk.past:
            cache = self._caches[chunk.key] = DynamicCache(config=self.model.spec)
        cache.crop(chunk.past)
        return cache

    def _scores(self, chunk: SequenceChunk) -> list[Tensor]:
        cache = self._cache(chunk)
        ids = torch.tensor([list(chunk.tokens)], device=self.model.device)
        tokens: dict[str, Tensor] = {"input_ids": ids}
        if chunk.images is not None and chunk.past < len(chunk.images.tokens):
            embeds = self.model.get_input_embeddings()(ids)
            own = chunk.images.rows[chunk.past : chunk.past + len(chunk.tokens)]
            for at, row in enumerate(own):
                if row >= 0:
                    embeds[0, at] = chunk.images.embeds[row].to(embeds)
            tokens = {"inputs_embeds": embeds}
        keep = max(1, chunk.wanted)
        out = self.model(
            **tokens, past_key_values=cache, use_cache=True, logits_to_keep=keep, return_dict=True
        )
        return [out.logits[0].float()] if chunk.wanted else []

    def drop(self, key: int) -> None:
        """Free the sequence's cache."""
        self._caches.pop(key, None)


def attention_weights(model: Any, ids: Sequence[int]) -> np.ndarray[Any, Any]:
    """The attention weights of the last of these tokens, float32 [layers, heads, tokens]; 0 for keys outside a layer's
    window."""
    device = model.device
    tokens = torch.tensor([list(ids)], device=device)
    cache = DynamicCache(config=model.spec)
    found = np.zeros((model.spec.layers, model.spec.attention.heads, len(ids)), np.float32)
    with torch.inference_mode():
        # The weights of all tokens would take the square of the memory, so the others go first, without theirs.
        if len(ids) > 1:
            model(input_ids=tokens[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        out = model(
            input_ids=tokens[:, -1:],
            past_key_values=cache,
            use_cache=True,
            output_attentions=True,
            return_dict=True,
        )
    for layer, attended in enumerate(out.attentions):
        row = attended[0, :, -1].float().cpu().numpy()
        kept = min(row.shape[-1], len(ids))
        found[layer, :, len(ids) - kept :] = row[:, row.shape[-1] - kept :]
    return found
