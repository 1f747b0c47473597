"""Pools of Ray's actors, on a stand-in for Ray; `tests/ecosystem/test_ray.py` has the real one."""

from __future__ import annotations

import asyncio
import random
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from monoblock.cluster.actors import DEATHS, ActorPool, Machine, check_address, connected, plan


class ActorDied(Exception):
    pass


class TaskError(Exception):
    def __init__(self, cause: Exception) -> None:
        super().__init__("a traceback")
        self.cause = cause


class Ray:
    """Actors whose calls fail by `failure(actor, argument)`, which returns an exception or None."""

    def __init__(self, failure: Any = lambda actor, argument: None) -> None:
        self.exceptions = SimpleNamespace(
            RayActorError=ActorDied,
            WorkerCrashedError=ActorDied,
            OutOfMemoryError=ActorDied,
            ObjectLostError=ActorDied,
            RayTaskError=TaskError,
        )
        self.failure, self.made, self.killed, self.most = failure, 0, 0, 0

    def actor(self) -> Any:
        """A new actor."""
        self.made += 1
        number, busy = self.made, 0

        async def load() -> str:
            await asyncio.sleep(0)
            if (error := self.failure(number, "load")) is not None:
                raise error
            return "loaded"

        async def square(value: int) -> int:
            nonlocal busy
            busy += 1
            self.most = max(self.most, busy)
            try:
                await asyncio.sleep(0.001 * (value % 3))
                if (error := self.failure(number, value)) is not None:
                    raise error
                return value * value
            finally:
                busy -= 1

        return SimpleNamespace(load=SimpleNamespace(remote=load), square=SimpleNamespace(remote=square))

    def kill(self, actor: Any) -> None:
        self.killed += 1


def squares(ray: Ray, count: int, replicas: int = 3, slots: int = 2) -> list[tuple[int, int]]:
    pool = ActorPool(ray, ray.actor, replicas, slots)
    with asyncio.Runner() as runner:
        try:
            assert runner.run(pool.start()) == "loaded"
            return list(pool.ordered(runner, "square", iter(range(1, count + 1))))
        finally:
            runner.run(pool.close())


@pytest.mark.parametrize("seed", range(3))
def test_calls_of_dead_actors_are_made_again_and_the_order_is_kept(seed: int) -> None:
    draw = random.Random(seed)
    deaths = 0

    def failure(actor: int, argument: Any) -> Exception | None:
        nonlocal deaths
        if draw.random() < 0.2:
            deaths += 1
            return ActorDied()
        return None

    ray = Ray(failure)
    assert squares(ray, 200) == [(i, i * i) for i in range(1, 201)]
    # An actor that died with two calls in progress is replaced once.
    assert deaths > 10 and 3 < ray.made <= 3 + deaths
    assert ray.killed == ray.made
    assert ray.most == 2


def test_exceptions_of_calls_are_raised_and_not_tried_again() -> None:
    tried = []

    def failure(actor: int, argument: Any) -> Exception | None:
        if argument == 7:
            tried.append(actor)
            return TaskError(ValueError("the seventh"))
        return None

    ray = Ray(failure)
    with pytest.raises(ValueError, match="the seventh"):
        squares(ray, 20)
    assert len(tried) == 1 and ray.killed == ray.made == 3


def test_exceptions_of_loading_are_raised() -> None:
    with pytest.raises(OSError, match="no such model"):
        squares(Ray(lambda actor, argument: TaskError(OSError("no such model"))), 3)


def test_a_call_that_ends_every_actor_ends_the_run() -> None:
    ray = Ray(lambda actor, argument: ActorDied("killed  by\n9") if argument == 7 else None)
    with pytest.raises(RuntimeError, match=r"12 actors died, .* finished nothing: killed by 9"):
        squares(ray, 20, replicas=2)
    assert DEATHS * 3 == 12 and ray.made < 20


@pytest.mark.parametrize(
    ("machines", "replicas", "device", "expected"),
    [
        ([(8, 0)], None, "auto", (1, 8, False)),
        ([(8, 0)], 3, "cpu", (3, 2, False)),
        ([(8, 0), (8, 0)], 3, "cpu", (3, 4, False)),  # five each would fit two only
        ([(8, 0), (4, 0)], None, "auto", (2, 4, False)),
        ([(16, 4), (16, 4)], None, "auto", (8, 4, True)),
        ([(16, 4)], 2, "cuda", (2, 8, True)),
        ([(16, 4)], None, "cpu", (1, 16, False)),
    ],
)
def test_machines_are_divided(
    machines: list[tuple[int, int]], replicas: int | None, device: str, expected: tuple[int, int, bool]
) -> None:
    found = plan([Machine(*each) for each in machines], replicas, device, local=False)
    assert (found.replicas, found.threads, found.gpu) == expected
    assert found.cpus == found.threads


def test_local_actors_may_be_more_than_cpus_and_share_the_memory() -> None:
    found = plan([Machine(2, 0, 9000)], 3, "auto", local=True)
    assert (found.replicas, found.threads, found.cpus, found.memory) == (3, 1, 1, 3000)
    assert plan([Machine(8, 0)], 2, "auto", local=True, threads=3).threads == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((Machine(2, 0), 3, "auto"), "--replicas 3: the machines have 2 CPUs"),
        ((Machine(8, 2), 3, "auto"), "--replicas 3: Ray finds 2 GPUs"),
        ((Machine(8, 0), 1, "cuda"), "--device cuda: Ray finds no GPU"),
        ((Machine(8, 2), 1, "cuda:1"), "--device cuda:1: Ray chooses"),
    ],
)
def test_plans_that_do_not_fit_are_refused(args: tuple[Machine, int, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan([args[0]], *args[1:], local=False)


def test_addresses() -> None:
    for text in ("auto", "local", "10.0.0.1:6379", "head-node.cluster:6379", "[::1]:6379"):
        assert check_address(text) == text
    for text, message in {
        "ray://head:10001": "not supported",
        "in.jsonl": "HOST:PORT",
        "": "HOST:PORT",
    }.items():
        with pytest.raises(ValueError, match=message):
            check_address(text)


class StartingRay(SimpleNamespace):
    """A stand-in for the module, whose `init` fails as often as there are errors."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__(errors=list(errors), options={}, down=0)

    def init(self, **options: Any) -> None:
        self.options = options
        if self.errors:
            raise self.errors.pop(0)

    def shutdown(self) -> None:
        self.down += 1

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"Alive": True, "Resources": {"CPU": 4.0, "memory": 100.0}},
            {"Alive": False, "Resources": {}},
        ]


def test_a_slow_start_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    slow = Exception("The current node timed out during startup. This could ...")
    ray = StartingRay(slow, slow)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with connected("local", 5) as cluster:
        print("a message of Ray")
        assert cluster.machines == (Machine(3, 0, 100),) and cluster.local
        assert ray.options["num_cpus"] == 5
    assert ray.down == 3
    assert capsys.readouterr() == ("", "a message of Ray\n")
    for address, errors in {
        "local": [slow] * 3,
        "auto": [slow],
        "head:6379": [RuntimeError("no\nroute")],
    }.items():
        monkeypatch.setitem(sys.modules, "ray", StartingRay(*errors))
        with pytest.raises(ConnectionError, match=f"--ray {address}: Ray does not start or answer: "):
            connected(address, None).__enter__()


def test_a_cluster_has_its_own_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = StartingRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    with connected("auto", None) as cluster:
        assert cluster.machines == (Machine(4, 0, 100),) and not cluster.local
    assert ray.options["address"] == "auto" and "num_cpus" not in ray.options
