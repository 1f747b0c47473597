"""The simulation of replicas: queueing formulas, a measured engine, routing, failures, and traces."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from monoblock.cluster import simulator
from monoblock.cluster.simulator import Arrival, EngineStep, RequestMix, SimulatedCluster, StepCost, simulate

ROOT = Path(__file__).parents[2]
# One request at a time, whose prompt of N tokens takes N milliseconds, and which waits in the front.
ONE = SimulatedCluster(max_sequences=1, ahead=1, max_step_tokens=10**9, cache_tokens=10**7, max_waiting=10**6)
SECOND = StepCost(prompt_token=1e-3, row=1e-3)
WHOLE = RequestMix(prompt=1000, new=1)


def requests(rate: float, count: int, mix: RequestMix = WHOLE, seed: int = 0) -> list[Arrival]:
    return [replace(one, new=1) for one in simulator.poisson(rate, count, mix, seed=seed)]


def waits(rate: float, mix: RequestMix = WHOLE, **more: Any) -> float:
    """The mean seconds in the system, of four times 3,000 requests."""
    means = [
        simulate(requests(rate, 3000, mix, seed), replace(ONE, **more), SECOND).mean_total
        for seed in range(4)
    ]
    return sum(means) / len(means)


def test_one_server_waits_as_queueing_theory_says() -> None:
    """M/M/1: 1 / (mu - lambda). M/D/1, by Pollaczek and Khinchine: half of its waiting time. Within four standard
    errors: the mean of 12,000 correlated times has one of 3.4%."""
    load = 0.6
    assert waits(load) == pytest.approx(1 / (1 - load), rel=0.13)
    constant = waits(load, replace(WHOLE, varies=False))
    assert constant == pytest.approx(1 + load / (2 * (1 - load)), rel=0.13)


def test_several_servers_wait_as_erlang_c_says() -> None:
    """M/M/3 at 2.1 requests per second."""
    servers, load = 3, 2.1
    terms = [load**k / math.factorial(k) for k in range(servers)]
    last = load**servers / math.factorial(servers) * servers / (servers - load)
    expected = 1 + last / (sum(terms) + last) / (servers - load)
    assert waits(load, replicas=servers) == pytest.approx(expected, rel=0.13)


@pytest.mark.parametrize("servers", [1, 3])
def test_requests_wait_for_the_first_free_server(servers: int) -> None:
    """Exactly, request by request; the only queue is the front's, so that all routings are the same."""
    arrivals, free, total = requests(0.9 * servers, 1000), [0.0] * servers, 0.0
    for one in arrivals:
        end = max(one.time, min(free)) + one.prompt / 1000
        free[free.index(min(free))] = end
        total += end - one.time
    for routing in simulator.ROUTINGS:
        found = simulate(arrivals, replace(ONE, replicas=servers, routing=routing), SECOND)
        assert found.mean_total == pytest.approx(total / 1000, rel=1e-9)


def test_a_measured_engine() -> None:
    """Recorded by bench/cluster_simulation.py: throughput within 3%, percentiles within 25%, 7% on average."""
    bench = ROOT / "bench" / "cluster_simulation.py"
    made = importlib.util.spec_from_file_location("cluster_simulation", bench)
    assert made and made.loader
    tool = sys.modules["cluster_simulation"] = importlib.util.module_from_spec(made)
    made.loader.exec_module(tool)
    differences: list[float] = []
    for line in tool.comparison(tool.STEPS)[2:]:
        _, run, what, _, _, difference, _ = (cell.strip() for cell in line.split("|"))
        value = abs(float(difference.rstrip("%")) / 100)
        bound = {"tokens per second": 0.03, "prefix hits": 0.01}.get(what, 0.25)
        assert value <= bound, (run, what)
        if what not in ("tokens per second", "prefix hits"):
            differences.append(value)
    assert len(differences) == 18 and sum(differences) / 18 < 0.07


def test_a_cost_is_fitted_to_steps_without_negative_terms() -> None:
    cost = StepCost(fixed=1e-3, row=2e-4, prompt_token=3e-5, pair=4e-8)
    steps = [
        EngineStep(rows=r, prompt=p, pairs=100 * r + p * p, seconds=cost.seconds(r, p, 100 * r + p * p))
        for r in range(0, 16, 3)
        for p in (0, 20, 100)
    ]
    assert asdict(StepCost.fitted(steps)) == pytest.approx(asdict(cost), rel=1e-6)
    falling = [EngineStep(rows=n, prompt=0, pairs=0, seconds=1 - n / 100) for n in range(8)]
    found = StepCost.fitted(falling)
    assert found.row == 0 and found.fixed == pytest.approx(0.965) and found.error(falling) < 0.03
    with pytest.raises(ValueError, match="at least 4 measured steps, got 2"):
        StepCost.fitted(steps[:2])


COST = StepCost(fixed=1e-3, row=1e-4, prompt_token=1e-4)
CHATS = RequestMix(prompt=32, new=16, prefixes=24, prefix_tokens=256)


def run(routing: str, count: int = 600, rate: float = 60.0, **more: Any) -> simulator.SimulationResult:
    # A replica's cache has room for a third of the prefixes.
    cluster = SimulatedCluster(
        **{"replicas": 4, "max_sequences": 16, "cache_tokens": 4096, **more}, routing=routing
    )
    return simulate(simulator.poisson(rate, count, CHATS, seed=3), cluster, COST)


def test_routing_by_prefix_finds_more_in_the_caches() -> None:
    found = {routing: run(routing) for routing in simulator.ROUTINGS}
    assert all(one.finished == 600 for one in found.values())
    others = [one.hit_rate for routing, one in found.items() if routing != "prefix"]
    assert found["prefix"].hit_rate > 1.2 * max(others) and min(others) > 0
    assert found["prefix"].busy < min(one.busy for name, one in found.items() if name != "prefix")
    none = run("prefix", prefix_cache=False)
    assert none.hit_rate == 0 and none.first[50] > found["prefix"].first[50]


def test_requests_of_a_replica_that_dies_are_given_to_another_one() -> None:
    """Those whose answer has begun are lost; others, and those that are not streamed, are not."""
    calm, broken = run("two-choices"), run("two-choices", failures=((3.0, 0), (5.0, 1)), restart=2.0)
    assert calm.lost == calm.retried == 0
    assert 0 < broken.lost < 60 and broken.lost + broken.finished == 600
    arrivals = [replace(one, stream=False) for one in simulator.poisson(60.0, 600, CHATS, seed=3)]
    cluster = SimulatedCluster(replicas=4, max_sequences=16, failures=((3.0, 0), (5.0, 1)), restart=2.0)
    whole = simulate(arrivals, cluster, COST)
    assert whole.lost == 0 and whole.finished == 600 and whole.retried >= broken.lost
    often = run("least-load", lifetime=2.0, restart=1.0)
    assert often.retried > 0 and often.finished + often.lost + often.refused == 600
    alone = run("least-load", replicas=1, failures=((1.0, 0),), restart=5.0, max_waiting=10)
    assert alone.refused > 0


def test_a_full_cache_preempts_the_youngest_and_all_end() -> None:
    mix = RequestMix(prompt=100, new=200, varies=False)
    arrivals = simulator.poisson(1e6, 12, mix)
    small = simulate(arrivals, SimulatedCluster(max_sequences=12, cache_tokens=1280), COST)
    large = simulate(arrivals, SimulatedCluster(max_sequences=12), COST)
    assert small.finished == large.finished == 12
    assert small.preempted > 0 == large.preempted and small.seconds > large.seconds
    with pytest.raises(ValueError, match="does not fit into cache_tokens=128"):
        simulate(arrivals, SimulatedCluster(cache_tokens=128), COST)


def test_a_step_takes_prompts_in_chunks_beside_running_sequences() -> None:
    """A prompt of 100 tokens in steps of 64, and another one whose token is made in each of these."""
    cluster = SimulatedCluster(max_step_tokens=64)
    cost = StepCost(fixed=1.0)
    arrivals = [Arrival(time=0.0, prompt=10, new=5), Arrival(time=0.5, prompt=100, new=1)]
    found = simulate(arrivals, cluster, cost)
    # The first one's five tokens in steps 1 to 5; the second one's prompt in steps 2 and 3.
    assert found.seconds == 5.0 and found.total[99] == pytest.approx(5.0, abs=0.1)
    assert found.first == {50: 1.75, 90: pytest.approx(2.35), 99: pytest.approx(2.485)}
    assert found.tokens_per_second == 6 / 5 and found.busy == 1.0


def test_bursts_wait_longer() -> None:
    cluster = SimulatedCluster(max_sequences=8)
    alone, together = (
        simulate(simulator.bursts(20.0, 400, size, RequestMix(prompt=64, new=8), seed=4), cluster, COST)
        for size in (1, 20)
    )
    assert together.first[90] > 2 * alone.first[90]
    with pytest.raises(ValueError, match="rate must be above 0"):
        simulator.bursts(0.0, 1, 1, CHATS)


def test_traces_are_read_and_wrong_lines_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"time": 0.5, "prompt": 9, "new": 2}\n\n{"time": 1, "prompt": 80, "new": 1, "prefix": "a", '
        '"prefix_tokens": 64, "stream": false}\n'
    )
    assert simulator.read_trace(path) == [
        Arrival(time=0.5, prompt=9, new=2),
        Arrival(time=1, prompt=80, new=1, prefix="a", prefix_tokens=64, stream=False),
    ]
    for line, message in (
        ("{", "line 1: no JSON"),
        ('{"time": 1}', "line 1: expected an object with time, prompt and new"),
        ('{"time": 1, "prompt": "x", "new": 1}', "line 1: prompt='x' is no field of a request"),
        ('{"time": 1, "prompt": 1, "new": 1, "more": 1}', "line 1: more=1 is no field"),
        ('{"time": 1, "prompt": 0, "new": 1}', "line 1: times and tokens must be positive"),
    ):
        path.write_text(line)
        with pytest.raises(ValueError, match=message):
            simulator.read_trace(path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"routing": "random"},
            "routing must be one of two-choices, least-load, round-robin, prefix, got 'random'",
        ),
        ({"replicas": 0}, "replicas must be at least 1"),
        ({"lifetime": 0.0}, "lifetime must be above 0"),
        ({"failures": ((1.0, 1),)}, "failures must name replicas from 0 to 0"),
    ],
)
def test_impossible_clusters_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulatedCluster(**more)
    with pytest.raises(ValueError, match="at least one request"):
        simulate([], ONE, COST)
