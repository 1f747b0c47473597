"""The interface between an engine and a backend: the next tokens of several sequences, in one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from monoblock.generation.arrays import Array, ArrayOps

BLOCK = 64  # tokens of a block of the cache; BLOCK_TOKENS of native/paged_attention.hpp


@dataclass(frozen=True, kw_only=True)
class EmbeddedImages:
    """A prompt with images: its token ids, the embeddings of its patches, and a row of them for each token, or -1.

    `digest` identifies the images' content.
    """

    tokens: list[int]
    embeds: Any
    rows: list[int]
    digest: bytes


@dataclass(frozen=True, kw_only=True)
class SequenceChunk:
    """The next tokens of one sequence.

    `past`: its tokens in the cache; `table`: its blocks, which have room for `past` and these tokens; `wanted`: the
    number of the last of these tokens whose scores are computed.
    """

    key: int
    tokens: Sequence[int]
    past: int
    table: Sequence[int]
    wanted: int
    images: EmbeddedImages | None = None


class BatchRunner(Protocol):
    """A model and the KV caches of the sequences of an engine.

    `divides`: a sequence's scores have the same bits however it is divided into chunks, so that a prompt may be
    computed in chunks, its blocks shared, and a sequence recomputed. `why`: why not, or None. `drafts`: a chunk may
    have tokens that the sequence does not get, after the next one. `failure`: the error after which no step can be
    computed.
    """

    ops: ArrayOps
    vocab: int
    blocks: int
    divides: bool
    drafts: bool
    why: str | None

    @property
    def failure(self) -> BaseException | None: ...

    def run(self, chunks: Sequence[SequenceChunk]) -> Array:
        """Compute these tokens: scores (sum of wanted, vocabulary), float32, in the order of the chunks."""
        ...

    def embed_images(self, inputs: dict[str, Any]) -> EmbeddedImages:
        """The embeddings of the images of a processor's output for one text."""
        ...

    def drop(self, key: int) -> None:
        """Forget a sequence."""
        ...

    def watch(self, told: Callable[[], None]) -> None:
        """Call a function, from any thread, when `failure` is set."""
        ...

    def close(self) -> None:
        """End what the runner has started."""
        ...
