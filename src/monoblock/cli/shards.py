"""The processes of `generate --tensor-parallel N`: this one and N - 1 others on this machine, each with a shard."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monoblock.cli import console
from monoblock.cli.options import DownloadOptions, FrameworkModelOptions
from monoblock.partition import check_shards

if TYPE_CHECKING:
    from monoblock.serving.server.registry import ModelEntry

HUNG = 5.0  # seconds after the failure of another process until this one ends, if it does not by itself


@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """The processes of this machine that hold a model: shards of it, or stages."""

    tensor_parallel: Annotated[
        int,
        typer.Option(
            min=1, help="Shard the model over this many processes of this machine, on GPUs or CPUs (PyTorch)."
        ),
    ] = 1
    pipeline_parallel: Annotated[
        int,
        typer.Option(
            min=1,
            help="Divide the layers among this many processes of this machine, on GPUs or CPUs (PyTorch).",
        ),
    ] = 1

    @property
    def option(self) -> str | None:
        """The option that asks for several processes, for messages; None: there is one process."""
        return next((f"--{name.replace('_', '-')}" for name, count in vars(self).items() if count > 1), None)

    def refuse(self, **others: Any) -> None:
        """Usage error for both options together, or for options (by name) that do not go with one of them."""
        if min(self.tensor_parallel, self.pipeline_parallel) > 1:
            raise typer.BadParameter("--tensor-parallel does not go with --pipeline-parallel: give one")
        for name, value in others.items():
            if self.option is not None and value:
                raise typer.BadParameter(f"{self.option} does not go with --{name.replace('_', '-')}")

    def check(self, entries: Sequence[ModelEntry], hub: DownloadOptions) -> None:
        """ValueError unless one of the models generates text, which is the one that is divided, and it can be."""
        if self.option is None:
            return
        generating = [entry for entry in entries if entry.kind == "generate"]
        if len(generating) != 1:
            found = ", ".join(entry.name for entry in generating) or "none"
            raise ValueError(
                f"{self.option} divides one model that generates text; the models that do are: {found}"
            )
        spec = spec_of(generating[0].source, hub)
        if self.tensor_parallel > 1:
            check_shards(spec, self.tensor_parallel, "--tensor-parallel")
        elif self.pipeline_parallel > spec.layers:
            raise ValueError(
                f"--pipeline-parallel {self.pipeline_parallel}: the model has {spec.layers} layers"
            )


def spec_of(model: str | None, hub: DownloadOptions) -> Any:
    """The spec of a model, from its config."""
    from monoblock import AutoConfig
    from monoblock.cli.engine import locate

    path, _ = locate(model)
    return AutoConfig.from_pretrained(path, **(hub.kwargs() if model else {})).to_spec()


@contextmanager
def processes(
    count: int,
    source: FrameworkModelOptions,
    hub: DownloadOptions,
    text: str,
    limit: int,
    options: dict[str, Any],
) -> Iterator[None]:
    """Start the other processes, which complete the same text (`limit`: new tokens by default); within, this process is
    the first of them. The command ends with an error if one of them fails. ValueError: the model does not divide into
    that many shards."""
    from monoblock.pipelines.frameworks import FRAMEWORKS

    starter = FRAMEWORKS["pt"].processes
    starter.check(spec_of(source.model, hub), count, source.device, "--tensor-parallel")
    peers = starter.Peers(count, source.device, complete, source, hub, text, limit, options)
    ended = threading.Event()

    def end() -> None:
        if not ended.wait(HUNG):  # in a collective that does not notice it
            console.print_error(peers.failure)
            os._exit(console.FAILURE)

    peers.on_failure = end
    try:
        yield
    except RuntimeError as error:
        raise peers.lost(error) from error
    finally:
        ended.set()
        peers.close()


def complete(
    receive: Callable[[], Any],
    source: FrameworkModelOptions,
    hub: DownloadOptions,
    text: str,
    limit: int,
    options: dict[str, Any],
) -> None:
    """Complete the text together with the first process, without printing it."""
    from monoblock.cli import engine

    del receive  # there are no messages
    loaded = engine.load(source, hub, sharded=True)
    loaded.complete(text, loaded.limits(limit) | options, _ignore)


def _ignore(text: str) -> None:
    """The first process prints the text."""
    del text
