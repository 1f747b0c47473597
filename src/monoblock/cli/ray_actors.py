"""What Ray's actors of `monoblock embed` and `monoblock batch` do. A process of Ray imports this module.

`load` checks that the machine has the model that the command saw: the vectors and results of one file come from one.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from monoblock.cluster.actors import prepare

if TYPE_CHECKING:
    import numpy as np

    from monoblock.serving.batch_files import BatchLine


def _same(found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(
            f"the machine {socket.gethostname()} has another model or version of it than the one where the command "
            "runs: give all machines the same files"
        )


class EncoderActor:
    """An embedding model. `args`: those of `encoder.load`, the arguments of `encode`, and the model's fingerprint."""

    def __init__(self, threads: int, folder: str, args: tuple[Any, ...]) -> None:
        prepare(threads, folder)
        self._threads, self._args = threads, args
        self._encoder: Any = None

    def load(self) -> tuple[str, int]:
        """Load the model: its similarity and threads."""
        from monoblock.cli import encoder

        model, options, hub, framework, encode, fingerprint = self._args
        _same(encoder.identity(model, hub), fingerprint)
        self._encoder = encoder.load(model, options, hub, framework, **encode)
        self._encoder.use_threads(self._threads)
        return self._encoder.similarity, self._encoder.threads

    def encode(self, texts: list[str]) -> tuple[np.ndarray, int]:
        """As `Encoder.encode`."""
        return self._encoder.encode(texts)


class BatchActor:
    """The models of a batch. `args`: the command's options and the settings, and what the results depend on."""

    def __init__(self, threads: int, folder: str, args: tuple[Any, ...]) -> None:
        prepare(threads, folder)
        self._args = args
        self._answers: Any = None
        self._answer: Any = None

    async def load(self) -> bool:
        """Load the models."""
        import asyncio

        from monoblock.cli.batch_models import decisive, entries
        from monoblock.serving.batch import answers

        models, hub, settings, expected = self._args
        found = await asyncio.to_thread(entries, models, hub)
        _same(await asyncio.to_thread(decisive, found, models, hub), expected)
        self._answers = answers(found, settings)
        self._answer = (await self._answers.__aenter__()).answer
        return True

    async def answer(self, line: BatchLine) -> dict[str, Any]:
        """The result of a request, as a line of the output."""
        return await self._answer(line)
