"""The processes of a sharded model on this machine: this program is the first, and starts the others.

    python -m monoblock.backends.pytorch.parallel.processes        a process other than the first

The first process writes messages to the standard input of the others. So they wait for work outside of collectives,
however long that takes, and end when the first one ends, however that happens.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from monoblock.backends.pytorch.parallel.stages import check_stages, constructing_stage
from monoblock.partition import check_shards

HOST = "127.0.0.1"
STARTUP = 300.0  # seconds until the other processes have imported PyTorch
REPORT = 3.0  # seconds that the report of a process that failed may take
ENDING = 5.0  # seconds that the other processes get to end by themselves
TIMEOUT = datetime.timedelta(minutes=30)  # of a collective: PyTorch's default for gloo
DEVICES = ("auto", "cpu", "cuda")

Receive = Callable[[], Any]


def check(spec: Any, count: int, device: str, argument: str, *, stages: bool = False) -> None:
    """ValueError: the model does not divide into `count` shards (or `stages`), or there are not enough GPUs.
    `argument`: its name in errors."""
    (check_stages if stages else check_shards)(spec, count, argument)
    if device not in DEVICES:
        raise ValueError(f"device {device}: {argument} takes auto, cpu or cuda, a GPU for each process")
    if device == "cuda" and torch.cuda.device_count() < count:
        raise ValueError(
            f"{argument}={count}: there are {torch.cuda.device_count()} GPUs; use the device cpu"
        )


def on_gpus(device: str, count: int) -> bool:
    """Whether that many processes run on GPUs: on one each."""
    return device != "cpu" and torch.cuda.device_count() >= count


@contextlib.contextmanager
def as_stage() -> Iterator[dict[str, Any]]:
    """A context in which this process of the group loads its stage; the arguments of `from_pretrained` for its
    device."""
    place = {"device_map": f"cuda:{torch.cuda.current_device()}"} if dist.get_backend() == "nccl" else {}
    with constructing_stage(dist.get_rank(), dist.get_world_size()):
        yield place


class Peers:
    """The other processes of a group whose first process is this one.

    Each calls `work(receive, *args)`, where `receive()` waits for the next message of `send`; it ends with this
    process, or with `close`. `failure`: the error of a process that ended too soon; then all others are ended too, so
    that a collective of this process raises an error, and `on_failure` is called in another thread.

    ValueError: this program is in a process group already. RuntimeError: a process does not start.
    """

    def __init__(self, count: int, device: str, work: Callable[..., None], *args: Any) -> None:
        if dist.is_initialized():
            raise ValueError(
                "this program is in a process group of torch.distributed already: it can hold one sharded model, and "
                "under torchrun from_pretrained(tp_plan='auto') uses its processes"
            )
        self.count = count
        self.failure: RuntimeError | None = None
        self.on_failure: Callable[[], None] = _nothing
        self._closing = False
        self._failed, self._lock = threading.Event(), threading.Lock()
        self._started = threading.Semaphore(0)
        gpus = on_gpus(device, count)
        self._threads = torch.get_num_threads()
        threads = self._threads if gpus else max(1, self._threads // count)
        store = TCPStore(HOST, 0, count, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        place = {"count": count, "port": store.port, "gpus": gpus}
        job = pickle.dumps((work, args))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", __name__]
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(1, count):
                process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
                self._processes.append(process)
                threading.Thread(target=self._listen, args=(rank, process), daemon=True).start()
                self._write(process, pickle.dumps({**place, "rank": rank}) + job)
            self._wait()
            torch.set_num_threads(threads)
            _join(store, 0, count, gpus)
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        """Until all processes are about to join the group."""
        until = time.monotonic() + STARTUP
        for _ in self._processes:
            while not self._started.acquire(timeout=0.1):
                if self.failure is not None:
                    raise self.failure
                if time.monotonic() > until:
                    raise RuntimeError(f"the other processes did not start within {STARTUP:g} seconds")

    def send(self, message: Any) -> None:
        """Give all others a message. RuntimeError if one of them has failed."""
        if self.failure is not None:
            raise self.failure
        content = pickle.dumps(message)
        try:
            for process in self._processes:
                self._write(process, content)
        except OSError as error:
            raise self.lost(error) from error

    @staticmethod
    def _write(process: subprocess.Popen[bytes], content: bytes) -> None:
        assert process.stdin is not None
        process.stdin.write(content)
        process.stdin.flush()

    def lost(self, error: BaseException) -> RuntimeError:
        """The failure, after an error of this process in work that all do together: their collectives are no longer in
        step, so that all processes end. That of another process, if it is the cause."""
        self._failed.wait(REPORT)
        self._fail(RuntimeError(f"process 0 of {self.count} failed: {_described(error)}"))
        assert self.failure is not None
        return self.failure

    def _listen(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        """Read what a process reports, until it ends."""
        text = None
        assert process.stdout is not None
        with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
            while True:
                kind, text = pickle.load(process.stdout)
                if kind == "started":
                    self._started.release()
        code = process.wait()
        reason = text or f"it ended with exit code {code}"
        self._fail(RuntimeError(f"process {rank} of {self.count} failed: {reason}"))

    def _fail(self, error: RuntimeError) -> None:
        with self._lock:
            if self._closing or self.failure is not None:
                return
            self.failure = error
        for process in self._processes:
            process.kill()
        self._failed.set()
        self.on_failure()

    def close(self) -> None:
        """End the other processes, and leave the group."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        if dist.is_initialized():
            dist.destroy_process_group()
        for process in self._processes:
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()
        until = time.monotonic() + ENDING
        for process in self._processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        torch.set_num_threads(self._threads)


def _nothing() -> None:
    """Nobody is told of a failure."""


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _join(store: Any, rank: int, count: int, gpus: bool) -> None:
    """Join the group."""
    if gpus:
        torch.cuda.set_device(rank)
    with _loopback():
        backend = "nccl" if gpus else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """gloo uses the interface of the machine's own address, which other machines may reach; by its name, the
    loopback."""
    name, variable = "lo", "GLOO_SOCKET_IFNAME"
    names = {found for _, found in socket.if_nameindex()} if hasattr(socket, "if_nameindex") else set[str]()
    if variable in os.environ or name not in names:
        yield
        return
    os.environ[variable] = name
    try:
        yield
    finally:
        del os.environ[variable]


def serve() -> None:
    """The work of a process other than the first. Its standard output is for reports."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides when this one ends
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.getLogger("monoblock").setLevel(logging.ERROR)  # the first process has the same warnings
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)

    def report(kind: str, text: str | None = None) -> None:
        with contextlib.suppress(OSError):
            pickle.dump((kind, text), sink)
            sink.flush()

    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        """Read messages. At their end the first process is gone: nobody waits for this one, whatever it does."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                messages.put(pickle.load(source))
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    try:
        place = messages.get()
        work, args = messages.get()
        store = TCPStore(HOST, place["port"], place["count"], is_master=False, timeout=TIMEOUT)
        report("started")
        _join(store, place["rank"], place["count"], place["gpus"])
        work(messages.get, *args)
        threading.Event().wait()  # the first process ends this one
    except BaseException as error:
        report("failed", _described(error))
        # Without the end of the interpreter, in which a collective would wait for processes that are gone.
        os._exit(1)


if __name__ == "__main__":
    from monoblock.backends.pytorch.parallel import processes

    processes.serve()
