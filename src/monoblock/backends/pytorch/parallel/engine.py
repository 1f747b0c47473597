"""The steps of a serving engine on a sharded model.

The first process has the engine: requests, scheduler, sampling and the text. It sends the others what they compute with
it in each step: the tokens, and which sequences are finished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from monoblock.backends.pytorch.engine_adapter import FREE_SHARE, ModuleRunner, cache_blocks
from monoblock.backends.pytorch.parallel.processes import Peers, Receive
from monoblock.generation.batches import EmbeddedImages, SequenceChunk

# Errors of inputs: all processes raise them alike, before a collective or after it.
_OF_INPUTS = (ValueError, TypeError, IndexError, KeyError)


class ShardedRunner:
    """The runner of the first process. An error in a step ends all processes: `failure`."""

    divides, drafts = False, True
    why: str | None

    def __init__(self, model: Any, peers: Peers, cache_memory: int | None) -> None:
        """`cache_memory`: bytes of the KV caches of all processes together."""
        self.peers, self.model = peers, model
        shared = 1 if model.device.type == "cuda" else peers.count  # of the memory that this process sees
        memory = None if cache_memory is None else cache_memory // peers.count
        self.blocks = cache_blocks(model, memory, FREE_SHARE * shared)
        self.why = f"the model is sharded over {peers.count} processes"
        self._runner = ModuleRunner(model, self.blocks, self.why, batched=True)
        self.ops, self.vocab = self._runner.ops, self._runner.vocab
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
            return self._runner.run(chunks)
        except Exception as error:
            raise self.peers.lost(error) from error

    def embed_images(self, inputs: dict[str, Any]) -> EmbeddedImages:
        """The embeddings of the images of a processor's output for one text; see `BatchRunner`."""
        self.peers.send(("images", inputs))
        try:
            return self._runner.embed_images(inputs)
        except _OF_INPUTS:
            raise
        except Exception as error:
            raise self.peers.lost(error) from error

    def drop(self, key: int) -> None:
        """Free the sequence's cache: here now, in the other processes with the next step."""
        self._runner.drop(key)
        self._dropped.append(key)

    def close(self) -> None:
        """End the other processes."""
        self.peers.close()


def follow(model: Any, receive: Receive) -> None:
    """Compute what the first process sends, until it ends (EOFError)."""
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
