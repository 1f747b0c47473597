"""Simulates replicas of a server by `monoblock.cluster.simulator`, with the measured steps of an engine.

    python bench/cluster_simulation.py measure [--model FOLDER] [--output engine_steps.json]
    python bench/cluster_simulation.py simulate [--steps engine_steps.json] [--replicas 1,2,4] [--rate 20]
        [--routing two-choices,prefix] [--trace requests.jsonl] [--lifetime SECONDS] [--burst N]
    python bench/cluster_simulation.py tables          (writes the table and the picture of docs/scaling.md)

`measure` runs the engine (by default on the embedded demo) in one thread: first on requests that all arrive at once,
then on Poisson arrivals and bursts. It compares their latencies with simulated ones, by the cost of each run's steps.
Its clock is the thread's processor time, which other work on the machine changes little; while nothing is to do, it
jumps to the next arrival. There is no HTTP and no front in it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict, replace
from html import escape
from pathlib import Path
from typing import Any

from monoblock.cluster import simulator
from monoblock.cluster.simulator import Arrival, EngineStep, RequestMix, SimulatedCluster, StepCost

ROOT = Path(__file__).parents[1]
STEPS = ROOT / "tests" / "fixtures" / "engine_steps.json"
PAGE, PICTURE = ROOT / "docs" / "scaling.md", ROOT / "docs" / "routing.svg"
BEGIN, END = "<!-- simulation: bench/cluster_simulation.py tables -->\n", "<!-- end of simulation -->\n"
OPTIONS = {"max_sequences": 16, "max_step_tokens": 128}
CACHE = 16_384  # tokens of the engine that is measured
MIX = RequestMix(prompt=96, new=24, prefixes=3, prefix_tokens=128)
LONGEST = 320  # tokens of a prompt at most, and half as many new ones


def clipped(arrivals: list[Arrival]) -> list[Arrival]:
    return [replace(one, prompt=min(one.prompt, LONGEST), new=min(one.new, LONGEST // 2)) for one in arrivals]


def prompt_of(arrival: Arrival, number: int, vocab: int) -> list[int]:
    """Random ids, the first ones by the prefix."""
    shared, own = random.Random(arrival.prefix), random.Random(f"own {number}")
    return [
        (shared if i < arrival.prefix_tokens else own).randrange(5, vocab - 1) for i in range(arrival.prompt)
    ]


def measured(engine: Any, arrivals: list[Arrival]) -> tuple[list[EngineStep], dict[str, Any]]:
    """The steps of an engine on these requests, and the result in the form of a simulation's."""
    from monoblock.serving.engine.params import SamplingParams

    steps, now = list[EngineStep](), 0.0
    first, last, made = dict[int, float](), dict[int, float](), dict[int, int]()
    stats = engine.stats()
    before, hits = stats.prefix_query_tokens, stats.prefix_hit_tokens
    schedule, planned = engine.scheduler.schedule, list[Any]()

    def recorded() -> Any:
        planned[:] = schedule()
        return list(planned)

    engine.scheduler.schedule = recorded
    waiting, running = sorted(enumerate(arrivals), key=lambda one: -one[1].time), dict[int, Any]()
    busy = 0.0
    while waiting or engine.busy:
        while waiting and (waiting[-1][1].time <= now or not engine.busy):
            number, arrival = waiting.pop()
            now = max(now, arrival.time)
            params = SamplingParams(max_tokens=arrival.new, temperature=0, ignore_eos=True)
            prompt = prompt_of(arrival, number, engine.vocab)
            running[number] = engine.add(prompt, params, sink=lambda *_: None)
        begin = time.thread_time()
        engine.step()
        seconds = time.thread_time() - begin
        now, busy = now + seconds, busy + seconds
        chunks = [(len(chunk.tokens), chunk.past) for _, chunk in planned]
        steps.append(
            EngineStep(
                rows=sum(count == 1 for count, _ in chunks),
                prompt=sum(count for count, _ in chunks if count > 1),
                pairs=sum(count * past + count * (count + 1) // 2 for count, past in chunks),
                seconds=seconds,
            )
        )
        for number, request in list(running.items()):
            count = len(request.sequences[0].tokens) - arrivals[number].prompt
            if count and number not in first:
                first[number] = now
            if request.sequences[0].finish is not None:
                last[number], made[number] = now, count
                del running[number]
    engine.scheduler.schedule = schedule
    span = now - min(one.time for one in arrivals)
    stats = engine.stats()
    return steps, {
        "requests_per_second": len(last) / span,
        "tokens_per_second": sum(made.values()) / span,
        "first": simulator.percentiles([first[n] - one.time for n, one in enumerate(arrivals)]),
        "between": simulator.percentiles(
            [(last[n] - first[n]) / (made[n] - 1) for n in range(len(arrivals)) if made[n] > 1]
        ),
        "total": simulator.percentiles([last[n] - one.time for n, one in enumerate(arrivals)]),
        "hit_rate": (stats.prefix_hit_tokens - hits) / max(1, stats.prefix_query_tokens - before),
        "busy": busy / span,
    }


def engine_of(model: str | None) -> Any:
    """An engine with a cache of `CACHE` tokens."""
    import torch

    from monoblock.serving.engine.loading import load_engine
    from monoblock.serving.engine.options import EngineOptions

    torch.set_num_threads(1)
    memory = 64 << 20
    while True:  # the bytes of a token are the model's
        found = load_engine(model, options=EngineOptions(cache_memory=memory, **OPTIONS), device="cpu")
        blocks = found.pool.count
        if blocks * simulator.BLOCK == CACHE:
            return found
        memory = memory * CACHE // (blocks * simulator.BLOCK)


def cluster_of(**more: Any) -> SimulatedCluster:
    return SimulatedCluster(**{**OPTIONS, "cache_tokens": CACHE, **more})


def measure(model: str | None, output: Path) -> None:
    """Write the measurements, and print the comparison."""
    measured(engine_of(model), clipped(simulator.poisson(1e6, 40, MIX, seed=9)))  # the processor's caches
    steps, at_once = measured(engine_of(model), clipped(simulator.poisson(1e6, 150, MIX, seed=1)))
    capacity = at_once["requests_per_second"]
    runs: dict[str, list[Arrival]] = {
        "60% of the capacity": simulator.poisson(0.6 * capacity, 200, MIX, seed=3),
        "85% of the capacity": simulator.poisson(0.85 * capacity, 200, MIX, seed=4),
        "bursts of 8, 60%": simulator.bursts(0.6 * capacity, 200, 8, MIX, seed=5),
    }
    found: dict[str, Any] = {"capacity": capacity, "runs": {}, "steps": thinned(steps)}
    for name, arrivals in runs.items():
        arrivals = clipped(arrivals)
        own, result = measured(engine_of(model), arrivals)
        found["runs"][name] = {
            "arrivals": [[round(a.time, 6), a.prompt, a.new, a.prefix, a.prefix_tokens] for a in arrivals],
            "steps": thinned(own),
            "measured": result,
        }
    output.write_text(json.dumps(found) + "\n")
    cost = StepCost.fitted(steps)
    print(
        f"capacity {capacity:.1f} requests/s; cost {asdict(cost)}; mean error of a step {cost.error(steps):.1%}"
    )
    for line in comparison(output):
        print(line)


def thinned(steps: list[EngineStep]) -> list[list[float]]:
    """Some of the steps, at most 500."""
    return [[s.rows, s.prompt, s.pairs, round(s.seconds, 7)] for s in steps[:: -(-len(steps) // 500)]]


def cost_of(steps: list[list[float]]) -> StepCost:
    return StepCost.fitted(
        [EngineStep(rows=int(r), prompt=int(p), pairs=int(k), seconds=s) for r, p, k, s in steps]
    )


def read(path: Path) -> tuple[StepCost, float, dict[str, Any]]:
    """The cost, the requests per second of an engine, and the runs of a file of measurements."""
    found = json.loads(path.read_text())
    return cost_of(found["steps"]), found["capacity"], found["runs"]


def comparison(path: Path) -> list[str]:
    """A Markdown table of simulated and measured values. The cost is that of a run's own steps: the speed of a machine
    with other work differs from run to run."""
    _, _, runs = read(path)
    lines = ["| arrivals | | measured | simulated | difference |", "|---|---|---|---|---|"]
    for name, run in runs.items():
        arrivals = [
            Arrival(time=t, prompt=p, new=n, prefix=x, prefix_tokens=k) for t, p, n, x, k in run["arrivals"]
        ]
        made, was = asdict(simulator.simulate(arrivals, cluster_of(), cost_of(run["steps"]))), run["measured"]
        rows = [("tokens per second", made["tokens_per_second"], was["tokens_per_second"])]
        for what, key in (("first token", "first"), ("later tokens", "between"), ("whole answer", "total")):
            for p in (50, 90):
                rows.append((f"{what}, {p}%, ms", made[key][p] * 1e3, was[key][str(p)] * 1e3))
        rows.append(("prefix hits", made["hit_rate"], was["hit_rate"]))
        for what, new, old in rows:
            lines.append(f"| {name} | {what} | {old:,.3g} | {new:,.3g} | {new / old - 1:+.1%} |")
    return lines


# ---------------------------------------------------------------------------- tables and picture

CHATS = RequestMix(prompt=64, new=24, prefixes=64, prefix_tokens=512)  # 64 system prompts
DOCS_CACHE = 16_384  # of a replica: half of the system prompts


def studied(rate: float, routing: str, count: int = 2000, **more: Any) -> simulator.SimulationResult:
    arrivals = simulator.poisson(rate, count, CHATS, seed=1)
    cost, _, _ = read(STEPS)
    return simulator.simulate(arrivals, cluster_of(routing=routing, cache_tokens=DOCS_CACHE, **more), cost)


def tables() -> None:
    """Write the documentation's part and the picture."""
    _, capacity, _ = read(STEPS)
    text = PAGE.read_text(encoding="utf-8")
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    base = 4 * capacity * 0.45
    lines = [
        "| four replicas | requests/s | first token 50%, 99%, ms | hits | busy | retried | lost |",
        "|---|---|---|---|---|---|---|",
    ]
    cases = [(f"`{routing}`", routing, {}) for routing in simulator.ROUTINGS]
    cases.append(("`prefix`, one dies for 5 s", "prefix", {"failures": ((4.0, 0),), "restart": 5.0}))
    cases.append(
        ("`two-choices`, one dies for 5 s", "two-choices", {"failures": ((4.0, 0),), "restart": 5.0})
    )
    for label, routing, more in cases:
        found = studied(base, routing, replicas=4, **more)
        lines.append(
            f"| {label} | {found.requests_per_second:.0f} | {found.first[50] * 1e3:.0f}, {found.first[99] * 1e3:.0f} | "
            f"{found.hit_rate:.0%} | {found.busy:.0%} | {found.retried} | {found.lost} |"
        )
    PAGE.write_text(text[:start] + "\n".join(lines) + "\n" + text[end:], encoding="utf-8")
    shares = [0.15, 0.25, 0.35, 0.45, 0.55, 0.65]
    curves = {
        routing: [
            (4 * capacity * s, studied(4 * capacity * s, routing, 500, replicas=4).first[90] * 1e3)
            for s in shares
        ]
        for routing in ("two-choices", "round-robin", "least-load", "prefix")
    }
    PICTURE.write_text(picture(curves), encoding="utf-8")


def picture(curves: dict[str, list[tuple[float, float]]]) -> str:
    """An SVG of the curves, with a logarithmic vertical axis."""
    import math

    width, height, left, right, top, bottom = 640, 340, 64, 110, 28, 44
    points = [point for curve in curves.values() for point in curve]
    most = max(x for x, _ in points)
    low = math.floor(math.log10(min(y for _, y in points)))
    high = math.ceil(math.log10(max(y for _, y in points)))

    def place(x: float, y: float) -> str:
        across = left + x / most * (width - left - right)
        return f"{across:.1f},{height - bottom - (math.log10(y) - low) / (high - low) * (height - top - bottom):.1f}"

    found = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' "
        "font-family='sans-serif' font-size='12'>",
        "<title>Time to the first token of four replicas by their load, simulated</title>",
        f"<rect width='{width}' height='{height}' fill='white'/>",
    ]
    for power in range(low, high + 1):
        x, y = place(0, 10.0**power).split(",")
        found.append(f"<path d='M{x} {y}H{width - right}' stroke='#ddd'/>")
        found.append(f"<text x='{left - 6}' y='{float(y) + 4:.1f}' text-anchor='end'>{10.0**power:g}</text>")
    for share in range(6):
        x, _ = place(most * share / 5, 10.0**low).split(",")
        found.append(
            f"<text x='{x}' y='{height - bottom + 16}' text-anchor='middle'>{most * share / 5:.0f}</text>"
        )
    found.append(
        f"<text x='{(left + width - right) / 2}' y='{height - 8}' text-anchor='middle'>requests per second</text>"
    )
    found.append(f"<text x='{left}' y='16'>first token, 90th percentile, ms</text>")
    for number, (name, curve) in enumerate(curves.items()):
        colour = ("#4269d0", "#9c6b4e", "#3ca951", "#ff725c")[number]
        found.append(
            f"<polyline points='{' '.join(place(*point) for point in curve)}' fill='none' stroke='{colour}' "
            "stroke-width='1.8'/>"
        )
        found.append(
            f"<text x='{width - right + 8}' y='{top + 24 + 18 * number}' fill='{colour}'>{escape(name)}</text>"
        )
    return "\n".join([*found, "</svg>", ""])


def run(given: argparse.Namespace) -> None:
    """Print a table of simulations."""
    cost, capacity, _ = read(given.steps)
    rate = given.rate or 0.6 * capacity
    arrivals = (
        simulator.read_trace(given.trace)
        if given.trace
        else simulator.bursts(rate, given.requests, given.burst, MIX, seed=given.seed)
    )
    print(
        "| replicas | routing | requests/s | tokens/s | first 50%, 90%, 99%, ms | later 50%, 99%, ms | hits | busy | "
        "retried | lost | refused |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for replicas in map(int, given.replicas.split(",")):
        for routing in given.routing.split(","):
            made = cluster_of(
                replicas=replicas,
                routing=routing,
                lifetime=given.lifetime,
                restart=given.restart,
                cache_tokens=given.cache_tokens,
                seed=given.seed,
            )
            found = simulator.simulate(arrivals, made, cost)
            first = ", ".join(f"{value * 1e3:.0f}" for value in found.first.values())
            later = ", ".join(f"{found.between[p] * 1e3:.1f}" for p in (50, 99))
            print(
                f"| {replicas} | {routing} | {found.requests_per_second:.1f} | {found.tokens_per_second:.0f} | "
                f"{first} | {later} | {found.hit_rate:.0%} | {found.busy:.0%} | {found.retried} | {found.lost} | "
                f"{found.refused} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("measure")
    one.add_argument("--model")
    one.add_argument("--output", type=Path, default=STEPS)
    one = commands.add_parser("simulate")
    one.add_argument("--steps", type=Path, default=STEPS)
    one.add_argument("--replicas", default="1,2,4")
    one.add_argument("--routing", default=",".join(simulator.ROUTINGS))
    one.add_argument("--rate", type=float, help="requests per second; default: 60%% of one engine's")
    one.add_argument("--requests", type=int, default=2000)
    one.add_argument("--burst", type=int, default=1)
    one.add_argument("--trace", type=Path)
    one.add_argument("--lifetime", type=float)
    one.add_argument("--restart", type=float, default=30.0)
    one.add_argument("--cache-tokens", type=int, default=CACHE)
    one.add_argument("--seed", type=int, default=0)
    commands.add_parser("tables")
    given = parser.parse_args()
    if given.command == "measure":
        measure(given.model, given.output)
    elif given.command == "simulate":
        run(given)
    else:
        tables()


if __name__ == "__main__":
    main()
