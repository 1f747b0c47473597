"""Pools of processes that encode texts: each has the model, read from a folder that all share."""

from __future__ import annotations

import math
import multiprocessing
import os
import queue
import shutil
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CHUNKS = 10  # per process, unless chunk_size is given
LARGEST = 5000  # texts per chunk by default

Pool = dict[str, Any]  # "input", "output": queues; "processes": a list; "folder": of the model's files


def start(model: Any, devices: Sequence[str], method: str) -> Pool:
    """Start one process per device; `method` is called there with chunks of inputs."""
    if not devices:
        raise ValueError("target_devices is empty: give at least one device")
    folder = Path(tempfile.mkdtemp(prefix="monoblock-pool-"))
    try:
        model.write(folder)
        # Not a fork, which would copy the locks of threads, and cannot use CUDA.
        context = multiprocessing.get_context("spawn")
        inputs, outputs = context.Queue(), context.Queue()
        threads = max(1, (os.cpu_count() or 1) // len(devices))
        made = []
        for device in devices:
            arguments = (type(model), str(folder), model.loading(), device, threads, method, inputs, outputs)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            made.append(process)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return {"input": inputs, "output": outputs, "processes": made, "folder": folder}


def stop(pool: Pool) -> None:
    """End the processes, and remove the folder of the model's files."""
    for process in pool["processes"]:
        process.terminate()
    for process in pool["processes"]:
        process.join()
        process.close()
    pool["input"].close()
    pool["output"].close()
    shutil.rmtree(pool["folder"], ignore_errors=True)


def run(
    pool: Pool,
    inputs: Sequence[Any],
    options: dict[str, Any],
    chunk_size: int | None,
    advance: Callable[[int], Any],
) -> list[Any]:
    """The results of the inputs' chunks, in order; `advance` is called with the size of each finished chunk.

    RuntimeError with the process's traceback if a chunk fails, or if a process ends.
    """
    if chunk_size is None:
        chunk_size = max(1, min(math.ceil(len(inputs) / len(pool["processes"]) / CHUNKS), LARGEST))
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size!r}: expected an integer of at least 1")
    starts = range(0, len(inputs), chunk_size)
    for number, start_ in enumerate(starts):
        pool["input"].put((number, list(inputs[start_ : start_ + chunk_size]), options))
    found: dict[int, Any] = {}
    while len(found) < len(starts):
        number, result, error = _next(pool)
        if error is not None:
            raise RuntimeError(f"a process of the pool failed:\n{error}")
        found[number] = result
        advance(min(chunk_size, len(inputs) - starts[number]))
    return [found[number] for number in range(len(starts))]


def _next(pool: Pool) -> tuple[int, Any, str | None]:
    while True:
        try:
            return pool["output"].get(timeout=1)
        except queue.Empty:
            dead = [process for process in pool["processes"] if not process.is_alive()]
            if dead:
                raise RuntimeError(f"a process of the pool ended with exit code {dead[0].exitcode}") from None


def _work(
    kind: Any,
    folder: str,
    loading: dict[str, Any],
    device: str,
    threads: int,
    method: str,
    inputs: Any,
    outputs: Any,
) -> None:
    """The loop of a process."""
    try:
        model = kind(folder, device=device, **loading)
        model.limit_threads(threads)
    except BaseException:
        outputs.put((-1, None, traceback.format_exc()))
        return
    while True:
        number, chunk, options = inputs.get()
        try:
            outputs.put((number, getattr(model, method)(chunk, **options), None))
        except Exception:
            outputs.put((number, None, traceback.format_exc()))
