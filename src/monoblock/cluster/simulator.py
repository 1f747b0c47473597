"""A discrete-event simulation of replicas behind a front: latencies, throughput and prefix-cache hits before machines
are bought. Only steps take time, by a cost that is fitted to steps of a real engine.

A replica has the rules of the engine (`serving/engine/scheduler.py`): a step has one token of each sequence whose
prompt is complete, and fills the rest of its tokens with prompts, the oldest first; blocks of finished prompts stay in
the cache until their memory is needed. The front has those of `cluster/front.py`: a request whose replica dies before
its first byte goes to another one.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import random
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from monoblock.cluster.affinity import preferred
from monoblock.field_types import brief

BLOCK = 64  # tokens of a block of the cache
SPARE = 50  # a new sequence leaves this part of the blocks free
ATTEMPTS, PAUSE = 4, 0.25  # of the front: replicas that a request is given to, seconds before another one
ROUTINGS = ("two-choices", "least-load", "round-robin", "prefix")
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class EngineStep:
    """A measured step: sequences that got one token, tokens of prompts, pairs of a query and a key, and seconds."""

    rows: int
    prompt: int
    pairs: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """The seconds of a step, linear in its rows, its tokens of prompts, and its pairs of a query and a key."""

    fixed: float = 0.0
    row: float = 0.0
    prompt_token: float = 0.0
    pair: float = 0.0

    def seconds(self, rows: int, prompt: int, pairs: int) -> float:
        """The time of a step."""
        return self.fixed + self.row * rows + self.prompt_token * prompt + self.pair * pairs

    @classmethod
    def fitted(cls, steps: Sequence[EngineStep]) -> StepCost:
        """The least squares of the seconds, without negative terms. ValueError: there are too few steps."""
        if len(steps) < 4:
            raise ValueError(f"a cost of four terms needs at least 4 measured steps, got {len(steps)}")
        seconds = np.array([step.seconds for step in steps])
        terms = np.array([[1, step.rows, step.prompt, step.pairs] for step in steps], dtype=float)
        scale = np.maximum(terms.max(axis=0), 1.0)
        used, found = [index for index in range(4) if terms[:, index].any()], np.zeros(4)
        while used:
            found[:] = 0
            found[used] = np.linalg.lstsq(terms[:, used] / scale[used], seconds, rcond=None)[0] / scale[used]
            if found.min() >= 0:
                break
            used.remove(int(found.argmin()))
        fixed, row, prompt_token, pair = found.tolist()
        return cls(fixed=fixed, row=row, prompt_token=prompt_token, pair=pair)

    def error(self, steps: Sequence[EngineStep]) -> float:
        """The mean relative error of the steps' times."""
        made = [self.seconds(step.rows, step.prompt, step.pairs) / step.seconds - 1 for step in steps]
        return float(np.mean(np.abs(made)))


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A request: seconds of its arrival, tokens of its prompt and new ones. The first `prefix_tokens` of the prompt are
    those of all requests with the same `prefix`. `stream`: its tokens are sent one by one."""

    time: float
    prompt: int
    new: int
    prefix: str = ""
    prefix_tokens: int = 0
    stream: bool = True


@dataclass(frozen=True, kw_only=True)
class SimulatedCluster:
    """The replicas and their engines. `cache_tokens`: of the KV cache of each; `ahead`: requests of a replica for each
    of its sequences, others wait in the front, `max_waiting` at most. `failures`: pairs of a time and the number of a
    replica that dies then; `lifetime`: mean seconds until a replica dies, exponentially distributed. A replica that
    dies is back after `restart` seconds, with an empty cache."""

    replicas: int = 1
    routing: str = "two-choices"
    max_sequences: int = 64
    max_step_tokens: int = 256
    cache_tokens: int = 1 << 20
    prefix_cache: bool = True
    ahead: int = 2
    max_waiting: int = 1024
    failures: tuple[tuple[float, int], ...] = ()
    lifetime: float | None = None
    restart: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, got {brief(self.routing)}")
        for name in ("replicas", "max_sequences", "max_step_tokens", "cache_tokens", "ahead"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.lifetime is not None and self.lifetime <= 0:
            raise ValueError(f"lifetime must be above 0, got {self.lifetime}")
        if any(not 0 <= replica < self.replicas for _, replica in self.failures):
            raise ValueError(f"failures must name replicas from 0 to {self.replicas - 1}")


@dataclass(frozen=True, kw_only=True)
class SimulationResult:
    """What was simulated. `first` and `between`: the percentiles of the seconds to the first token, and of the mean
    seconds of each later token of a request; `total`: of the seconds in all. `retried`: times that a request was
    given to another replica; `lost`: requests whose answer ended with an error; `refused`: those that found all queues
    full. `hit_rate`: the part of the prompts' tokens that was in the prefix cache; `busy`: the part of the time in
    which the replicas computed."""

    finished: int
    lost: int
    refused: int
    retried: int
    preempted: int
    seconds: float
    requests_per_second: float
    tokens_per_second: float
    first: dict[int, float]
    between: dict[int, float]
    total: dict[int, float]
    mean_total: float
    hit_rate: float
    busy: float


@dataclass(eq=False)
class _Request:
    arrival: Arrival
    order: int
    attempts: int = 0
    done: int = 0  # tokens of prompt and answer that are computed
    made: int = 0  # new tokens
    first: float | None = None
    shared: bool = False  # holds the blocks of its prefix in the cache
    blocks: int = 0  # of its own

    @property
    def missing(self) -> int:
        """Tokens to compute before the next one is made."""
        return self.arrival.prompt + max(0, self.made) - self.done

    def forget(self) -> None:
        """Computed tokens are lost."""
        self.done, self.blocks, self.shared = 0, 0, False


class _Cache:
    """Blocks of sequences that run, and of texts that nobody uses, the oldest first."""

    def __init__(self, count: int) -> None:
        self.count, self.used = count, 0
        self.idle: OrderedDict[str, int] = OrderedDict()  # text -> blocks
        self.held: dict[str, list[int]] = {}  # prefix in use -> [blocks, sequences]
        self._idle_blocks = 0
        self._numbers = itertools.count()

    @property
    def free(self) -> int:
        """Blocks that can be allocated."""
        return self.count - self.used

    def allocate(self, blocks: int) -> bool:
        """Take blocks, from idle texts if need be; False if there are not enough."""
        if blocks > self.free:
            return False
        self.used += blocks
        while self.used + self._idle_blocks > self.count:
            name, held = self.idle.popitem(last=False)
            left = max(0, self.count - self.used - (self._idle_blocks - held))
            self._idle_blocks -= held - left
            if left:  # later blocks of a text are taken before earlier ones
                self.idle[name] = left
                self.idle.move_to_end(name, last=False)
        return True

    def find(self, prefix: str, most: int) -> int:
        """Hold the blocks of a prefix, at most so many; 0 if none are known."""
        if prefix in self.held:
            self.held[prefix][1] += 1
        elif self.idle.get(prefix, 0) and most:
            blocks = self.idle.pop(prefix)
            self._idle_blocks -= blocks
            self.used += blocks
            self.held[prefix] = [blocks, 1]
        else:
            return 0
        return min(most, self.held[prefix][0])

    def register(self, prefix: str, blocks: int) -> bool:
        """Make the blocks of a sequence known as those of a prefix; False if they are known already."""
        if prefix in self.held or not blocks:
            return False
        if prefix in self.idle:
            self._idle_blocks -= self.idle.pop(prefix)
        self.held[prefix] = [blocks, 1]
        return True

    def release(self, request: _Request, keeps: bool) -> None:
        """Give up the blocks of a sequence, which stay as an idle text if the cache `keeps` them."""
        self.used -= request.blocks
        if request.shared:
            held = self.held[request.arrival.prefix]
            held[1] -= 1
            if not held[1]:
                del self.held[request.arrival.prefix]
                self.used -= held[0]
                self._keep(request.arrival.prefix, held[0])
        if keeps and request.blocks:
            self._keep(f"\0{next(self._numbers)}", request.blocks)

    def _keep(self, name: str, blocks: int) -> None:
        self.idle[name] = blocks
        self._idle_blocks += blocks


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


class _Engine:
    """A replica."""

    def __init__(self, number: int, cluster: SimulatedCluster, cost: StepCost) -> None:
        self.number, self.cluster, self.cost = number, cluster, cost
        self.alive, self.life = True, 0
        self.busy = 0.0
        self.queried = self.hits = self.preempted = 0
        self.empty()

    def empty(self) -> None:
        """Begin without requests and with an empty cache."""
        self.waiting: deque[_Request] = deque()
        self.running: list[_Request] = []
        self.cache = _Cache(max(1, self.cluster.cache_tokens // BLOCK))
        self.stepping = False

    @property
    def load(self) -> int:
        """Its requests."""
        return len(self.waiting) + len(self.running)

    def plan(self) -> list[tuple[_Request, int]]:
        """The sequences of the next step, with the tokens of each that are computed."""
        budget, planned = self.cluster.max_step_tokens, list[tuple[_Request, int]]()
        for request in list(self.running):
            if request not in self.running:
                continue
            count = request.missing if request.missing == 1 else min(request.missing, budget)
            if count and self._grow(request, request.done + count):
                planned.append((request, count))
                budget = max(0, budget - count)
        planned = [entry for entry in planned if entry[0] in self.running]
        while budget > 0 and len(self.running) < self.cluster.max_sequences:
            request = next((one for one in self.waiting if not self._follows(one)), None)
            if request is None or not self._admit(request):
                break
            self.waiting.remove(request)
            self.running.append(request)
            count = min(request.missing, budget)
            planned.append((request, count))
            budget -= count
        return planned

    def _follows(self, request: _Request) -> bool:
        """Whether a sequence with the same prefix computes it now, which this one then finds in the cache."""
        prefix = request.arrival.prefix
        if (
            not prefix
            or not self.cluster.prefix_cache
            or prefix in self.cache.held
            or prefix in self.cache.idle
        ):
            return False
        return any(one.arrival.prefix == prefix and one.missing > 1 for one in self.running)

    def _admit(self, request: _Request) -> bool:
        arrival, hit = request.arrival, 0
        if self.cluster.prefix_cache and arrival.prefix:
            # The last token of a prompt is computed in any case.
            hit = self.cache.find(arrival.prefix, min(arrival.prefix_tokens, arrival.prompt - 1) // BLOCK)
        request.shared = hit > 0
        blocks = _blocks(arrival.prompt + request.made) - hit
        spare = self.cache.count // SPARE if self.running else 0
        if blocks + spare > self.cache.free or not self.cache.allocate(blocks):
            self.cache.release(request, False)
            request.forget()
            if not self.running:
                raise ValueError(
                    f"a prompt of {arrival.prompt} tokens does not fit into cache_tokens={self.cluster.cache_tokens}"
                )
            return False
        request.blocks, request.done = blocks, hit * BLOCK
        if not request.made:
            self.queried += arrival.prompt
            self.hits += hit * BLOCK
        return True

    def _grow(self, request: _Request, tokens: int) -> bool:
        """Room for so many tokens; the youngest sequence gives up its blocks if there is none."""
        held = self.cache.held[request.arrival.prefix][0] if request.shared else 0
        more = _blocks(tokens) - held - request.blocks
        while more > 0 and not self.cache.allocate(more):
            youngest = max(self.running, key=lambda one: one.order)
            if youngest is request and len(self.running) == 1:
                raise ValueError(
                    f"a request of {tokens} tokens does not fit into cache_tokens={self.cluster.cache_tokens}"
                )
            self.running.remove(youngest)
            self.cache.release(youngest, self.cluster.prefix_cache)
            youngest.forget()
            self.waiting.appendleft(youngest)
            self.preempted += 1
            if youngest is request:
                return False
        request.blocks += max(0, more)
        return True

    def seconds(self, planned: Sequence[tuple[_Request, int]]) -> float:
        """The time of a step."""
        rows = sum(count == 1 for _, count in planned)
        prompt = sum(count for _, count in planned if count > 1)
        pairs = sum(count * one.done + count * (count + 1) // 2 for one, count in planned)
        return self.cost.seconds(rows, prompt, pairs)

    def advance(self, planned: Sequence[tuple[_Request, int]], now: float) -> list[_Request]:
        """The end of a step; returns the requests that are finished."""
        finished: list[_Request] = []
        for request, count in planned:
            request.done += count
            arrival = request.arrival
            shared = min(arrival.prefix_tokens, arrival.prompt - 1) // BLOCK
            if (
                self.cluster.prefix_cache
                and arrival.prefix
                and not request.shared
                and request.done >= shared * BLOCK
                and self.cache.register(arrival.prefix, shared)
            ):
                request.shared, request.blocks = True, request.blocks - shared
            if request.missing:
                continue
            request.made += 1
            request.first = now if request.first is None else request.first
            if request.made >= arrival.new:
                self.running.remove(request)
                self.cache.release(request, self.cluster.prefix_cache)
                finished.append(request)
        return finished


@dataclass
class _Totals:
    lost: int = 0
    refused: int = 0
    retried: int = 0
    tokens: int = 0
    end: float = 0.0
    first: list[float] = field(default_factory=list[float])
    between: list[float] = field(default_factory=list[float])
    total: list[float] = field(default_factory=list[float])


class _Simulation:
    """The events in the order of their times."""

    def __init__(self, arrivals: Sequence[Arrival], cluster: SimulatedCluster, cost: StepCost) -> None:
        self.cluster = cluster
        self.engines = [_Engine(number, cluster, cost) for number in range(cluster.replicas)]
        self.random = random.Random(cluster.seed)
        self.queue: deque[_Request] = deque()
        self.totals, self.turn, self.left = _Totals(), 0, len(arrivals)
        self._events: list[tuple[float, int, Any, tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        for order, arrival in enumerate(sorted(arrivals, key=lambda one: one.time)):
            self._at(arrival.time, self._arrive, _Request(arrival, order))
        for time, number in cluster.failures:
            self._at(time, self._fail, self.engines[number], None)
        for engine in self.engines:
            self._live(engine, 0.0)

    def _at(self, time: float, action: Any, *arguments: Any) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), action, arguments))

    def run(self) -> _Totals:
        """Until all requests have ended."""
        while self._events and self.left:
            time, _, action, arguments = heapq.heappop(self._events)
            action(time, *arguments)
        return self.totals

    def _end(self, now: float) -> None:
        self.left -= 1
        self.totals.end = now

    # ------------------------------------------------------------------ the front

    def _arrive(self, now: float, request: _Request) -> None:
        if (engine := self._route(request)) is not None:
            self._give(now, request, engine)
        elif len(self.queue) >= self.cluster.max_waiting:
            self.totals.refused += 1
            self._end(now)
        else:
            self.queue.append(request)

    def _route(self, request: _Request) -> _Engine | None:
        """The replica for a request; None if none that lives has room."""
        limit = self.cluster.ahead * self.cluster.max_sequences
        found = [engine for engine in self.engines if engine.alive and engine.load < limit]
        if not found:
            return None
        least = min(found, key=lambda engine: engine.load)
        match self.cluster.routing:
            case "two-choices":
                return min(self.random.sample(found, min(2, len(found))), key=lambda engine: engine.load)
            case "round-robin":
                self.turn += 1
                return min(found, key=lambda engine: (engine.number - self.turn) % len(self.engines))
            case "prefix" if request.arrival.prefix:
                bound = self.cluster.max_sequences // 2
                own = preferred(
                    request.arrival.prefix, found, lambda one: str(one.number), lambda one: one.load, bound
                )
                return least if own is None else own
            case _:
                return least

    def _give(self, now: float, request: _Request, engine: _Engine) -> None:
        request.attempts += 1
        engine.waiting.append(request)
        if not engine.stepping:
            self._step(now, engine)

    # ------------------------------------------------------------------ replicas

    def _step(self, now: float, engine: _Engine) -> None:
        if planned := engine.plan():
            seconds = engine.seconds(planned)
            engine.stepping, engine.busy = True, engine.busy + seconds
            self._at(now + seconds, self._stepped, engine, engine.life, planned)
        else:
            engine.stepping = False

    def _stepped(self, now: float, engine: _Engine, life: int, planned: Any) -> None:
        if engine.life != life:  # it died during the step
            return
        for request in engine.advance(planned, now):
            self._finish(now, request)
        self._fill(now)
        self._step(now, engine)

    def _fill(self, now: float) -> None:
        """Give waiting requests to replicas with room."""
        while self.queue and (engine := self._route(self.queue[0])) is not None:
            self._give(now, self.queue.popleft(), engine)

    def _finish(self, now: float, request: _Request) -> None:
        totals, arrival = self.totals, request.arrival
        assert request.first is not None
        totals.tokens += request.made
        totals.first.append(request.first - arrival.time)
        totals.total.append(now - arrival.time)
        if request.made > 1:
            totals.between.append((now - request.first) / (request.made - 1))
        self._end(now)

    # ------------------------------------------------------------------ failures

    def _live(self, engine: _Engine, now: float) -> None:
        if self.cluster.lifetime is not None:
            self._at(
                now + self.random.expovariate(1 / self.cluster.lifetime), self._fail, engine, engine.life
            )

    def _fail(self, now: float, engine: _Engine, life: int | None) -> None:
        if not engine.alive or life not in (None, engine.life):
            return
        requests = [*engine.running, *engine.waiting]
        engine.alive, engine.life = False, engine.life + 1
        engine.empty()
        for request in requests:
            begun = request.first is not None and request.arrival.stream
            if begun or request.attempts >= ATTEMPTS:
                self.totals.lost += 1
                self._end(now)
                continue
            self.totals.retried += 1
            request.forget()
            request.made, request.first = 0, None
            self._at(now + PAUSE, self._arrive, request)
        self._at(now + self.cluster.restart, self._restart, engine)

    def _restart(self, now: float, engine: _Engine) -> None:
        engine.alive = True
        self._live(engine, now)
        self._fill(now)


def simulate(arrivals: Sequence[Arrival], cluster: SimulatedCluster, cost: StepCost) -> SimulationResult:
    """The requests on the cluster, until all have ended. ValueError: there are none, or one does not fit into the
    cache."""
    if not arrivals:
        raise ValueError("a simulation needs at least one request")
    made = _Simulation(arrivals, cluster, cost)
    found, engines = made.run(), made.engines
    seconds = max(found.end - min(one.time for one in arrivals), 1e-12)
    queried = sum(engine.queried for engine in engines)
    return SimulationResult(
        finished=len(found.total),
        lost=found.lost,
        refused=found.refused,
        retried=found.retried,
        preempted=sum(engine.preempted for engine in engines),
        seconds=seconds,
        requests_per_second=len(found.total) / seconds,
        tokens_per_second=found.tokens / seconds,
        first=percentiles(found.first),
        between=percentiles(found.between),
        total=percentiles(found.total),
        mean_total=float(np.mean(found.total)) if found.total else math.nan,
        hit_rate=sum(engine.hits for engine in engines) / queried if queried else 0.0,
        busy=sum(engine.busy for engine in engines) / (seconds * len(engines)),
    )


def percentiles(values: Sequence[float]) -> dict[int, float]:
    """The percentiles `PERCENTILES`; NaN without values."""
    return {p: float(np.percentile(values, p)) if values else math.nan for p in PERCENTILES}


# ---------------------------------------------------------------------------- requests


@dataclass(frozen=True, kw_only=True)
class RequestMix:
    """Requests of one kind: the mean tokens of prompts and answers, exponentially distributed if `varies`; and
    `prefixes` texts of `prefix_tokens` with which prompts begin, one of them each."""

    prompt: int = 256
    new: int = 64
    varies: bool = True
    prefixes: int = 0
    prefix_tokens: int = 0

    def at(self, time: float, rng: random.Random) -> Arrival:
        """A request that arrives then."""

        def size(mean: int) -> int:
            return max(1, round(rng.expovariate(1 / mean))) if self.varies else mean

        prefix = f"prefix {rng.randrange(self.prefixes)}" if self.prefixes else ""
        shared = self.prefix_tokens if prefix else 0
        return Arrival(
            time=time,
            prompt=shared + size(self.prompt),
            new=size(self.new),
            prefix=prefix,
            prefix_tokens=shared,
        )


def poisson(rate: float, count: int, mix: RequestMix, seed: int = 0) -> list[Arrival]:
    """So many requests, `rate` of them per second, at independent times."""
    return bursts(rate, count, 1, mix, seed)


def bursts(rate: float, count: int, size: int, mix: RequestMix, seed: int = 0) -> list[Arrival]:
    """The same, in groups of `size` that arrive together."""
    if rate <= 0 or size < 1:
        raise ValueError(f"rate must be above 0 and size at least 1, got {rate} and {size}")
    rng, found, now = random.Random(seed), list[Arrival](), 0.0
    while len(found) < count:
        now += rng.expovariate(rate / size)
        found += [mix.at(now, rng) for _ in range(min(size, count - len(found)))]
    return found


def read_trace(path: str | Path) -> list[Arrival]:
    """The requests of a JSONL file: objects with `time`, `prompt` and `new`, and perhaps `prefix`, `prefix_tokens` and
    `stream`. ValueError: a line is no request."""
    return list(_lines(Path(path)))


def _lines(path: Path) -> Iterator[Arrival]:
    kinds: dict[str, Any] = {
        "time": (int, float),
        "prompt": int,
        "new": int,
        "prefix": str,
        "prefix_tokens": int,
    }
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: no JSON: {error}") from None
        if not isinstance(found, dict) or not {"time", "prompt", "new"} <= found.keys():
            raise ValueError(f"{path}, line {number}: expected an object with time, prompt and new")
        for name, value in found.items():
            kind = bool if name == "stream" else kinds.get(name)
            if kind is None or not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise ValueError(f"{path}, line {number}: {name}={brief(value)} is no field of a request")
        made = Arrival(**found)
        if made.time < 0 or made.prompt < 1 or made.new < 1 or not 0 <= made.prefix_tokens <= made.prompt:
            raise ValueError(
                f"{path}, line {number}: times and tokens must be positive, prefix_tokens at most prompt"
            )
        yield made
