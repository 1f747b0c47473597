"""Runs functions in two processes connected by gloo."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

WORLD = 2
SECONDS = 180


def _work(rank: int, port: int, calls: Connection) -> None:
    """Calls functions received through the connection until one fails."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "LOCAL_WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    while True:
        function, args = calls.recv()
        torch.manual_seed(0)
        try:
            calls.send((function(rank, *args), None))
        except BaseException:
            calls.send((None, traceback.format_exc()))
            # Exits without waiting for the other process, which may have failed.
            os._exit(0)
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Workers:
    """Two processes of a fork server that has imported the packages."""

    def __init__(self) -> None:
        here = str(Path(__file__).parent)
        if here not in sys.path:
            sys.path.insert(0, here)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.tensor", "transformers", "accelerate", "peft"])
        port = _free_port()
        pipes = [context.Pipe() for _ in range(WORLD)]
        self.calls = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_work, args=(rank, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for calls in self.calls:
            calls.send((function, args))
        results: dict[int, Any] = {}
        while len(results) < WORLD:
            left = [calls for rank, calls in enumerate(self.calls) if rank not in results]
            ready = wait(left, SECONDS)
            if not ready:
                raise AssertionError(f"no answer in {SECONDS} seconds")
            for calls in ready:
                rank = self.calls.index(calls)  # pyright: ignore[reportArgumentType]
                value, error = self.calls[rank].recv()
                if error is not None:
                    raise AssertionError(f"process {rank}:\n{error}")
                results[rank] = value
        return [results[rank] for rank in range(WORLD)]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()


@functools.cache
def _workers() -> Workers:
    return Workers()


def in_processes(function: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls function(rank, *args) in two processes; returns their results by rank (Python objects or NumPy arrays).

    The processes are reused, and replaced after a failure.
    """
    workers = _workers()
    try:
        return workers(function, *args)
    except BaseException:
        workers.stop()
        _workers.cache_clear()
        raise
