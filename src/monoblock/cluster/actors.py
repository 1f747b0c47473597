"""A pool of Ray's actors: each holds a model; those that die are replaced, and their calls are made again.

Ray is imported by `connected` only. Actors have no restarts of Ray's own, since a restarted actor would be without its
model until `load` was called again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from monoblock.field_types import brief

log = logging.getLogger("monoblock")

T = TypeVar("T")

LOCAL = "local"  # the address of an instance of Ray that is started on this machine, and ended again
ADDRESS = re.compile(r"auto|local|(\[[\da-fA-F:.]+\]|[\w.-]+):\d{1,5}")
DEVICES = ("auto", "cpu", "cuda")
STARTS = 3  # attempts to start Ray on a machine that is busy
SLOW = "timed out during startup"  # in the message of Ray's plain Exception
DEATHS = 4  # deaths per actor, plus as many, without a finished call in between, that end a run


@dataclass(frozen=True)
class ActorPlan:
    """What each of `replicas` actors gets: threads, a GPU or none, and bytes of the machine's memory (0: not known).
    `cpus`: what Ray reserves for it."""

    replicas: int
    threads: int
    gpu: bool
    cpus: int
    memory: int

    def summary(self) -> str:
        """For the user."""
        each = "a GPU each" if self.gpu else f"threads each: {self.threads}"
        return f"actors of Ray: {self.replicas}, {each}"


@dataclass(frozen=True)
class Machine:
    """What a machine of the cluster has; `memory` in bytes."""

    cpus: int
    gpus: int
    memory: int = 0


def check_address(text: str) -> str:
    """The address itself; ValueError if it is not one that Ray takes from a program on a machine of the cluster."""
    if text.startswith("ray://"):
        raise ValueError(
            f"--ray {text}: Ray's client protocol is not supported; run the command on a machine of the cluster with "
            "--ray auto, or submit it as a job of Ray"
        )
    if not ADDRESS.fullmatch(text):
        raise ValueError(f"--ray {brief(text)}: expected HOST:PORT, auto or local")
    return text


def check_device(device: str) -> None:
    """ValueError for a device that is not in `DEVICES`."""
    if device not in DEVICES:
        raise ValueError(
            f"--device {device}: Ray chooses an actor's GPU; give auto, cpu or cuda, or drop --ray"
        )


def plan(
    machines: Sequence[Machine], replicas: int | None, device: str, *, local: bool, threads: int | None = None
) -> ActorPlan:
    """Divide the machines among actors, by default one for each GPU, or for each machine if there are none.

    Without GPUs, each actor gets as many threads as leave room for all, or `threads` if they are given. Local actors
    may be more than the CPUs, since nothing else is scheduled on them.

    ValueError: another device than `DEVICES`; more actors than GPUs or CPUs.
    """
    check_device(device)
    gpus = sum(machine.gpus for machine in machines)
    if device == "cuda" and not gpus:
        raise ValueError("--device cuda: Ray finds no GPU; give --device cpu")
    gpu = device != "cpu" and gpus > 0
    count = replicas or (gpus if gpu else len(machines))
    if gpu and count > gpus:
        raise ValueError(f"--replicas {count}: Ray finds {gpus} GPUs; give fewer, or --device cpu")
    cpus = [machine.cpus for machine in machines]
    # The most threads with which `count` actors fit, none of them across two machines.
    fitting = [n for n in range(1, max(cpus) + 1) if sum(cpu // n for cpu in cpus) >= count]
    if not fitting and not local:
        raise ValueError(f"--replicas {count}: the machines have {sum(cpus)} CPUs; give fewer replicas")
    own = threads or (fitting[-1] if fitting else 1)
    # Ray fills one machine before it uses another one.
    most = count if local else max(min(count, machine.cpus // own or count) for machine in machines)
    memory = min(machine.memory for machine in machines) // most
    return ActorPlan(count, own, gpu, 1 if local else own, memory)


def available_threads() -> int:
    """The threads that a process of this machine would use: OMP_NUM_THREADS, or one for each CPU."""
    with contextlib.suppress(ValueError):
        if (given := int(os.environ.get("OMP_NUM_THREADS", ""))) > 0:
            return given
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def prepare(threads: int, folder: str) -> None:
    """In an actor, before a framework is imported: its threads, and the folder from which relative paths count."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if Path(folder).is_dir():
        os.chdir(folder)
    if "torch" in sys.modules:
        import importlib

        importlib.import_module("torch").set_num_threads(threads)


@dataclass(frozen=True)
class Cluster:
    """A connection to Ray."""

    ray: Any
    local: bool
    machines: tuple[Machine, ...]

    def plan(self, replicas: int | None, device: str, threads: int | None = None) -> ActorPlan:
        """`plan` for these machines."""
        return plan(self.machines, replicas, device, local=self.local, threads=threads)

    def starter(self, actor: type, plan: ActorPlan, *args: Any, calls: int = 1) -> Callable[[], Any]:
        """A function that starts an actor `actor(threads, folder, *args)`. `calls`: that it answers concurrently, for
        classes with coroutines."""
        options: dict[str, Any] = {"num_cpus": plan.cpus, "num_gpus": int(plan.gpu), "max_restarts": 0}
        if calls > 1:
            options["max_concurrency"] = calls
        remote = self.ray.remote(actor).options(**options)
        shared = self.ray.put(args)  # once, however many actors there are
        return lambda: remote.remote(plan.threads, str(Path.cwd()), shared)


@contextmanager
def connected(address: str, replicas: int | None) -> Generator[Cluster]:
    """A connection to Ray at an address (`check_address`); `LOCAL`: to processes of its own on this machine.

    Ray's messages, which it prints on standard output, go to standard error. ImportError: ray is not installed.
    ConnectionError: there is no cluster at that address, or Ray does not
    start.
    """
    check_address(address)
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError('--ray needs ray, which is not installed: pip install "monoblock[ray]"') from error
    local = address == LOCAL
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    threads = available_threads()
    if local:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options |= {"num_cpus": max(threads, replicas or 1), "include_dashboard": False}
    with contextlib.redirect_stdout(sys.stderr):
        _init(ray, address, options)
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            machines = [
                Machine(int(node.get("CPU", 0)), int(node.get("GPU", 0)), int(node.get("memory", 0)))
                for node in nodes
            ]
            if local:
                machines = [replace(machines[0], cpus=threads)]
            machines = [machine for machine in machines if machine.cpus]
            if not machines:
                raise ConnectionError(f"--ray {address}: no machine of the cluster has CPUs for actors")
            yield Cluster(ray, local, tuple(machines))
        finally:
            ray.shutdown()


def _init(ray: Any, address: str, options: dict[str, Any]) -> None:
    """`ray.init`, again if the processes of this machine are not ready after Ray's 30 seconds, which are fixed."""
    for left in range(STARTS - 1, -1, -1):
        try:
            ray.init(address=address, **options)
            return
        except Exception as error:
            ray.shutdown()
            reason = " ".join(str(error).split())
            if address != LOCAL or not left or SLOW not in reason:
                raise ConnectionError(f"--ray {address}: Ray does not start or answer: {reason}") from error
            log.warning("Ray is slow to start: trying again")


@dataclass(eq=False)
class _Replica:
    actor: Any
    loaded: bool = False
    calls: int = 0


class ActorPool:
    """Actors from `make`, each of which gets the call `load()` first and then at most `slots` calls at a time.

    A call whose actor dies is made again on another one. Exceptions of a call are raised as they are. RuntimeError if
    actors die again and again and no call is finished in between.
    """

    def __init__(self, ray: Any, make: Callable[[], Any], replicas: int, slots: int) -> None:
        self._ray, self._make, self._count, self._slots = ray, make, replicas, slots
        errors = ray.exceptions
        self._dead: tuple[type[BaseException], ...] = (
            errors.RayActorError,
            errors.WorkerCrashedError,
            errors.OutOfMemoryError,
            errors.ObjectLostError,
        )
        self._replicas: list[_Replica] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()
        self._error: BaseException | None = None
        self._deaths = 0
        self._first: Any = None
        self.replaced = 0  # actors that died and were replaced

    @property
    def capacity(self) -> int:
        """The number of calls that all actors take at a time."""
        return self._count * self._slots

    async def start(self) -> Any:
        """Start the actors and return the first answer of a `load()`. The others are loaded meanwhile; `close` ends
        all."""
        for _ in range(self._count):
            self._begin()
        async with self._changed:
            await self._changed.wait_for(lambda: self._error or any(r.loaded for r in self._replicas))
        if self._error is not None:
            raise self._error
        return self._first

    async def close(self) -> None:
        """End all actors."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for replica in self._replicas:
            self._kill(replica)
        self._replicas.clear()

    async def call(self, method: str, *args: Any) -> Any:
        """The value of a method of one of the actors, that with the fewest calls."""
        while True:
            replica = await self._acquired()
            try:
                value = await getattr(replica.actor, method).remote(*args)
            except self._dead as error:
                await self._lost(replica, error)
                continue
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None
            finally:
                replica.calls -= 1
                async with self._changed:
                    self._changed.notify_all()
            self._deaths = 0
            return value

    async def _acquired(self) -> _Replica:
        async with self._changed:
            await self._changed.wait_for(lambda: self._error or self._free())
            if self._error is not None:
                raise self._error
            replica = min(self._free(), key=lambda found: found.calls)
            replica.calls += 1
            return replica

    def _free(self) -> list[_Replica]:
        return [found for found in self._replicas if found.loaded and found.calls < self._slots]

    def _begin(self) -> None:
        replica = _Replica(self._make())
        self._replicas.append(replica)
        task = asyncio.create_task(self._load(replica))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self, replica: _Replica) -> None:
        try:
            answer = await replica.actor.load.remote()
        except self._dead as error:
            await self._lost(replica, error)
        except Exception as error:
            async with self._changed:
                self._error = getattr(error, "cause", error)
                self._changed.notify_all()
        else:
            async with self._changed:
                self._first = self._first or answer
                replica.loaded = True
                self._changed.notify_all()

    async def _lost(self, replica: _Replica, error: BaseException) -> None:
        """Replace an actor that died, once for all of its calls."""
        async with self._changed:
            if replica not in self._replicas:
                return
            self._replicas.remove(replica)
            self._kill(replica)
            self._deaths += 1
            if self._deaths >= DEATHS * (self._count + 1):
                reason = " ".join(str(error).split())
                self._error = RuntimeError(
                    f"{self._deaths} actors died, one after another, and finished nothing: {reason}"
                )
            else:
                self.replaced += 1
                log.warning("an actor of Ray died: another one takes over its work")
                self._begin()
            self._changed.notify_all()

    def _kill(self, replica: _Replica) -> None:
        with contextlib.suppress(Exception):
            self._ray.kill(replica.actor)

    def ordered(
        self, runner: asyncio.Runner, method: str, items: Iterator[T]
    ) -> Generator[tuple[T, Any], None, None]:
        """Each item with the value of the method for it, in the order of the items, of which at most `capacity` are
        read before their values are taken. `runner`: of the loop in which the pool was started."""

        async def begin(item: T) -> asyncio.Task[Any]:
            return asyncio.create_task(self.call(method, item))

        async def end(task: asyncio.Task[Any]) -> Any:
            return await task

        waiting: deque[tuple[T, asyncio.Task[Any]]] = deque()
        more = True
        while more or waiting:
            while more and len(waiting) < self.capacity:
                if (item := next(items, None)) is None:
                    more = False
                else:
                    waiting.append((item, runner.run(begin(item))))
            if waiting:
                item, task = waiting.popleft()
                yield item, runner.run(end(task))
