"""Processes of `--tensor-parallel N`: this one and N - 1 others on this machine, each with a shard of the model.

python -m monoblock.cli.shards        a process other than the first; its job is a JSON object on standard input
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from monoblock.cli import console
from monoblock.cli.options import DownloadOptions, FrameworkModelOptions

_POLL = 0.1  # seconds between looks at the other processes


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
    import torch

    from monoblock.cli import engine

    _check(count, source, hub)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if not engine.on_gpus(source.device, count):
        threads = max(1, torch.get_num_threads() // count)
        shared["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    job = json.dumps(
        {"source": asdict(source), "hub": asdict(hub), "text": text, "limit": limit, "options": options}
    )
    others: list[subprocess.Popen[str]] = []
    ended = threading.Event()
    try:
        for rank in range(1, count):
            own = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", "monoblock.cli.shards"]
            process = subprocess.Popen(command, env=own, stdin=subprocess.PIPE, stdout=sys.stderr, text=True)
            others.append(process)
            assert process.stdin is not None
            process.stdin.write(job)
            process.stdin.close()
        os.environ |= {**shared, "RANK": "0", "LOCAL_RANK": "0"}
        threading.Thread(target=_watch, args=(others, ended), daemon=True).start()
        yield
    finally:
        ended.set()
        for process in others:
            process.kill()
            process.wait()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _check(count: int, source: FrameworkModelOptions, hub: DownloadOptions) -> None:
    """ValueError: the model does not divide, or there are not enough GPUs."""
    import torch

    from monoblock import AutoConfig
    from monoblock.cli.engine import locate
    from monoblock.partition import check_shards

    path, _ = locate(source.model)
    config = AutoConfig.from_pretrained(path, **(hub.kwargs() if source.model else {}))
    check_shards(config.to_spec(), count, "--tensor-parallel")
    if source.device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"--device {source.device}: --tensor-parallel takes auto, cpu or cuda, a GPU for each process"
        )
    if source.device == "cuda" and torch.cuda.device_count() < count:
        raise ValueError(
            f"--tensor-parallel {count}: there are {torch.cuda.device_count()} GPUs; add --device cpu"
        )


def _watch(others: list[subprocess.Popen[str]], ended: threading.Event) -> None:
    """End this process with an error if another one fails: it would wait for that one."""
    while not ended.is_set():
        for rank, process in enumerate(others, 1):
            if process.poll() and not ended.is_set():
                console.print_error(RuntimeError(f"process {rank} of {len(others) + 1} failed (see above)"))
                for other in others:
                    other.kill()
                os._exit(console.FAILURE)
        time.sleep(_POLL)


def main() -> None:
    """Complete the text of the job together with the first process, without printing it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process stops this one
    job = json.loads(sys.stdin.read())
    from monoblock.cli import engine

    source, hub = FrameworkModelOptions(**_enums(job["source"])), DownloadOptions(**job["hub"])
    loaded = engine.load(source, hub, sharded=True)
    loaded.complete(job["text"], loaded.limits(job["limit"]) | job["options"], _ignore)


def _ignore(text: str) -> None:
    """The first process prints the text."""
    del text


def _enums(source: dict[str, Any]) -> dict[str, Any]:
    from monoblock.cli.options import Dtype, FrameworkName, Quantize

    kinds = {"dtype": Dtype, "quantize": Quantize, "framework": FrameworkName}
    return {name: kinds[name](x) if name in kinds and x is not None else x for name, x in source.items()}


if __name__ == "__main__":
    main()
