"""The steps of a serving engine on a model that several processes hold: as shards, or as stages of a pipeline.

The first process has the engine: requests, scheduler, sampling and the text. It sends the others what they compute with
it in each step: the tokens, and which sequences are finished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from monoblock.backends.pytorch import batched_step
from monoblock.backends.pytorch.arrays import TorchOps
from monoblock.backends.pytorch.engine_adapter import FREE_SHARE, ModuleRunner, cache_blocks, embed_images
from monoblock.backends.pytorch.parallel.processes import Peers, Receive
from monoblock.backends.pytorch.parallel.stages import Stage, StageCache, placed
from monoblock.generation.batches import EmbeddedImages, SequenceChunk

# Errors of inputs: all processes raise them alike, before a collective or after it.
_OF_INPUTS = (ValueError, TypeError, IndexError, KeyError)


class LeadingRunner:
    """The runner of the first process. An error in a step ends all processes: `failure`."""

    divides, drafts = False, True
    why: str | None
    blocks: int

    def __init__(self, model: Any, peers: Peers, why: str) -> None:
        self.model, self.peers, self.why = model, peers, why
        self.ops = TorchOps(model.device)
        self.vocab: int = model.spec.vocab
        self._dropped: list[int] = []

    @property
    def failure(self) -> BaseException | None:
        """Why no more steps can be computed; None if they can."""
        return self.peers.failure

    def watch(self, told: Callable[[], None]) -> None:
        """Call a function, in another thread, when a process fails."""
        self.peers.on_failure = told

    def run(self, chunks: Sequence[SequenceChunk]) -> Tensor:
        """Compute these tokens; see `BatchRunner`."""
        dropped, self._dropped = self._dropped, []
        self.peers.send(("run", dropped, list(chunks)))
        try:
            return self.compute(chunks)
        except Exception as error:
            raise self.peers.lost(error) from error

    def drop(self, key: int) -> None:
        """Free the sequence's cache: here now, in the other processes with the next step."""
        self.forget(key)
        self._dropped.append(key)

    def close(self) -> None:
        """End the other processes."""
        self.peers.close()

    def compute(self, chunks: Sequence[SequenceChunk]) -> Tensor:
        """This process's part of a step, and the scores of all."""
        raise NotImplementedError

    def forget(self, key: int) -> None:
        """Free a sequence's cache in this process."""
        raise NotImplementedError


class ShardedRunner(LeadingRunner):
    """The runner of a model with `tp_plan`."""

    def __init__(self, model: Any, peers: Peers, cache_memory: int | None) -> None:
        """`cache_memory`: bytes of the KV caches of all processes together."""
        super().__init__(model, peers, f"the model is sharded over {peers.count} processes")
        shared = 1 if model.device.type == "cuda" else peers.count  # of the memory that this process sees
        memory = None if cache_memory is None else cache_memory // peers.count
        self.blocks = cache_blocks(model, memory, FREE_SHARE * shared)
        self._runner = ModuleRunner(model, self.blocks, "", batched=True)

    def compute(self, chunks: Sequence[SequenceChunk]) -> Tensor:
        return self._runner.run(chunks)

    def forget(self, key: int) -> None:
        self._runner.drop(key)

    def embed_images(self, inputs: dict[str, Any]) -> EmbeddedImages:
        """The embeddings of the images of a processor's output for one text; see `BatchRunner`."""
        self.peers.send(("images", inputs))
        try:
            return self._runner.embed_images(inputs)
        except _OF_INPUTS:
            raise
        except Exception as error:
            raise self.peers.lost(error) from error


def follow(model: Any, receive: Receive) -> None:
    """Compute what the first process of a sharded model sends, until it ends."""
    model.eval()
    runner = ModuleRunner(model, 0, "", batched=True)
    while True:
        match receive():
            case ("run", dropped, chunks):
                for key in dropped:
                    runner.drop(key)
                runner.run(chunks)
            case ("images", inputs):
                try:
                    runner.embed_images(inputs)
                except _OF_INPUTS:
                    continue
            case other:
                raise ValueError(f"unknown message: {other!r}")


# ---------------------------------------------------------------------------- stages


class StageRunner:
    """One stage of a pipeline: hidden states come from the stage before, and go to the next one. The last one sends the
    scores to the first one."""

    def __init__(self, model: Any) -> None:
        stage: Stage | None = model.pipeline_stage
        assert stage is not None
        self.model, self.stage, self.spec = model.eval(), stage, model.spec
        self.device, self.dtype = placed(model)
        self._caches: dict[int, StageCache] = {}

    def run(self, chunks: Sequence[SequenceChunk]) -> Tensor | None:
        """Compute the stage's part of a step; the scores in the first process."""
        groups = divided(chunks, self.stage.count)
        sending: list[tuple[Any, Tensor]] = []  # with the tensors, which must stay until they are sent
        with torch.inference_mode():
            for group in groups:
                out = self._stage(group)
                following = 0 if self.stage.last else self.stage.index + 1
                sending.append((dist.isend(out, following), out))
            found = [self._scores(group) for group in groups] if self.stage.first else []
        for work, _ in sending:
            if work is not None:
                work.wait()
        return torch.cat(found) if found else None

    def drop(self, key: int) -> None:
        """Free the sequence's cache."""
        self._caches.pop(key, None)

    def _stage(self, chunks: Sequence[SequenceChunk]) -> Tensor:
        stage, model = self.stage, self.model
        context = batched_step.batch_context(self.spec, chunks, list(map(self._cache, chunks)), self.device)
        if stage.first:
            hidden = model.bare.embedded(batched_step.embedded(model, chunks), context)
        else:
            tokens = sum(len(chunk.tokens) for chunk in chunks)
            hidden = torch.empty((1, tokens, self.spec.width), dtype=self.dtype, device=self.device)
            dist.recv(hidden, stage.index - 1)
        hidden = batched_step.run_stage(model, hidden, context, stage.start, stage.end)
        return (batched_step.head_scores(model, hidden, chunks) if stage.last else hidden).contiguous()

    def _scores(self, chunks: Sequence[SequenceChunk]) -> Tensor:
        rows = sum(chunk.wanted for chunk in chunks)
        found = torch.empty((rows, self.spec.vocab), dtype=torch.float32, device=self.device)
        dist.recv(found, self.stage.count - 1)
        return found

    def _cache(self, chunk: SequenceChunk) -> StageCache:
        cache = self._caches.get(chunk.key)
        if cache is None or not chunk.past:
            cache = self._caches[chunk.key] = StageCache(self.spec, self.stage)
        cache.crop(chunk.past)
        return cache


def divided(chunks: Sequence[SequenceChunk], count: int) -> list[Sequence[SequenceChunk]]:
    """The chunks of a step in at most `count` groups, which the stages compute at the same time."""
    size = -(-len(chunks) // count)
    return [chunks[start : start + size] for start in range(0, len(chunks), size)]


class PipelineRunner(LeadingRunner):
    """The runner of a model whose stages are in several processes."""

    def __init__(self, model: Any, peers: Peers, cache_memory: int | None) -> None:
        """`cache_memory`: bytes of the KV caches of all processes together."""
        if (why := batched_step.obstacle(model)) is not None:
            raise ValueError(f"pipeline stages are not supported: {why}")
        super().__init__(model, peers, f"the layers are in {peers.count} processes")
        self.blocks = cache_blocks(model, cache_memory)
        self._runner = StageRunner(model)

    def compute(self, chunks: Sequence[SequenceChunk]) -> Tensor:
        found = self._runner.run(chunks)
        assert found is not None
        return found

    def forget(self, key: int) -> None:
        self._runner.drop(key)

    def embed_images(self, inputs: dict[str, Any]) -> EmbeddedImages:
        """The embeddings of the images of a processor's output for one text; see `BatchRunner`."""
        return embed_images(self.model, inputs)


def follow_stage(model: Any, receive: Receive) -> None:
    """Compute a stage of what the first process sends, until it ends."""
    runner = StageRunner(model)
    while True:
        _, dropped, chunks = receive()
        for key in dropped:
            runner.drop(key)
        runner.run(chunks)
