"""Runs a function in two processes that talk by gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 180


def _work(
    function: Callable[..., Any], rank: int, world: int, port: int, queue: Any, args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        torch.distributed.init_process_group("gloo")
        queue.put((rank, function(rank, *args), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
    finally:
        queue.close()
        queue.join_thread()
        # Without waiting for the other process, which may have failed.
        os._exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_processes(function: Callable[..., Any], *args: Any, world: int = 2) -> list[Any]:
    """function(rank, *args) in each of `world` processes: their results, by rank. Results are plain Python or NumPy.

    The processes are forked from a server that has imported the packages once.
    """
    here = str(Path(__file__).parent)
    if here not in sys.path:
        sys.path.insert(0, here)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor", "transformers", "accelerate", "peft"])
    queue = context.Queue()
    port = _free_port()
    processes = [
        context.Process(target=_work, args=(function, rank, world, port, queue, args), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in range(world):
            rank, value, error = queue.get(timeout=SECONDS)
            if error is not None:
                raise AssertionError(f"process {rank}:\n{error}")
            results[rank] = value
    finally:
        for process in processes:
            process.join(timeout=0 if len(results) < world else 10)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world)]
