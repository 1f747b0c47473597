"""Performance targets as data, and their evaluation on the results of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from figures import FRESH, LOSSLESS, OURS, Results, number, spread

THIN = {"thin-4": 4, "thin-28": 28}
Peers = tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """A figure as number and text."""

    value: float
    text: str


@dataclass(frozen=True)
class Target:
    """`measured` returns None if the run lacks its figures. `bound` is a lower one if `least`, else an upper one."""

    text: str
    measured: Callable[[Results], Found | None]
    bound: float
    least: bool = True


def ratio(
    model: str, form: str, measure: str, who: str, own: str = OURS
) -> Callable[[Results], Found | None]:
    """monoblock's figure relative to a peer's, per round; `own`: the backend of monoblock."""

    def read(results: Results) -> Found | None:
        figure = results.figure(model, form, measure)
        found = results.ratio(figure, who, own) if figure else None
        return Found(found.median, f"{found} x {who}") if found else None

    return read


def share(model: str, form: str) -> Callable[[Results], Found | None]:
    """Fraction of the bandwidth in decoding at batch size 1."""

    def read(results: Results) -> Found | None:
        figure = results.figure(model, form, "decode 1")
        if figure is None or OURS not in figure["values"]:
            return None
        found = results.bandwidth_share(figure, OURS)
        return None if found is None else Found(found.median, f"{found.percent} of the bandwidth")

    return read


def median(
    model: str, form: str, measure: str, unit: str, per: float = 1.0
) -> Callable[[Results], Found | None]:
    """monoblock's figure divided by `per`."""

    def read(results: Results) -> Found | None:
        values = results.values(model, form, measure)
        if not values:
            return None
        found = spread([value / per for value in values])
        return Found(found.median, f"{found} {unit}")

    return read


def _load_wide(results: Results) -> Found | None:
    """Loading in another dtype than the file's, and the time of allocating its memory."""
    values, alone = (results.values("mistral-1b", "float32", "load", who) for who in (OURS, FRESH))
    if not values:
        return None
    found = spread(values)
    return Found(found.median, f"{found} s" + (f"; {FRESH}: {spread(alone)}" if alone else ""))


def load_peak(model: str, form: str) -> Callable[[Results], Found | None]:
    """Peak memory while loading, relative to the size of all weights."""

    def read(results: Results) -> Found | None:
        peaks, counts = results.values(model, form, "load peak"), results.data["blocks"].get(model)
        if not peaks or not counts:
            return None
        size = sum(counts.values()) * {"float32": 4, "bfloat16": 2}[form] / 1e6
        found = spread([peak / size for peak in peaks])
        return Found(found.median, f"{found} x the weights")

    return read


def overhead(results: Results, who: str) -> tuple[float, float] | None:
    """Seconds per layer, and per token in addition to its layers."""
    times = {}
    for name, layers in THIN.items():
        values = results.values(name, "float32", "decode 1", who)
        if not values:
            return None
        times[layers] = 1 / spread(values).median
    few, many = min(times), max(times)
    slope = (times[many] - times[few]) / (many - few)
    return slope, times[few] - few * slope


def _overhead_at(layers: int) -> Callable[[Results], Found | None]:
    def read(results: Results) -> Found | None:
        if (found := overhead(results, OURS)) is None:
            return None
        slope, rest = (1e3 * seconds for seconds in found)
        budget = (rest + layers * slope) / (0.15 + 0.06 * layers)
        return Found(budget, f"{slope:.3f} ms per layer + {rest:.2f} ms")

    return read


def _tokens(results: Results) -> Found | None:
    """The largest margin at which the native path and PyTorch diverge, in units of the logits' error."""
    rows = [r for r in results.data.get("accuracy", []) if "as plain" in r and r["worst"]]
    if not rows:
        return None
    far = max((max(r["margins at divergence"], default=0.0) / r["worst"] for r in rows), default=0.0)
    equal, all_ = sum(r["as plain"] for r in rows), sum(r["tokens in all"] for r in rows)
    return Found(
        far, f"{equal} of {all_} tokens before the first difference, where the gap is {far:.1f} errors"
    )


TARGETS = (
    Target(
        "mistral-1b, bfloat16, decoding: 1.5 x transformers",
        ratio("mistral-1b", "bfloat16", "decode 1", "transformers"),
        1.5,
    ),
    Target("... and 80% of the bandwidth", share("mistral-1b", "bfloat16"), 0.80),
    Target(
        "mpt-1b, bfloat16, decoding: 2.4 x transformers",
        ratio("mpt-1b", "bfloat16", "decode 1", "transformers"),
        2.4,
    ),
    Target(
        "... lossless",
        ratio("mpt-1b", "bfloat16", "decode 1", "transformers", LOSSLESS),
        2.4,
    ),
    Target(
        "gpt-neo-125m, float32, decoding: 1.4 x transformers",
        ratio("gpt-neo-125m", "float32", "decode 1", "transformers"),
        1.4,
    ),
    Target(
        "openai-gpt, float32, decoding: 4 x transformers",
        ratio("openai-gpt", "float32", "decode 1", "transformers"),
        4.0,
    ),
    Target("mistral-1b, float32, decoding: 88% of the bandwidth", share("mistral-1b", "float32"), 0.88),
    Target("int8, decoding: 80% of the bandwidth", share("mistral-1b", "int8"), 0.80),
    *(
        Target(f"{form}, decoding: ahead of {who}", ratio("mistral-1b", form, "decode 1", who), 1.0)
        for form, who in (
            ("int8", "llama.cpp"),
            ("int8", "OpenVINO"),
            ("int8", "CTranslate2"),
            ("int4", "llama.cpp"),
            ("int4", "OpenVINO"),
        )
    ),
    Target(
        "batch size 8, bfloat16: 1.5 x transformers",
        ratio("mistral-1b", "bfloat16", "decode 8", "transformers"),
        1.5,
    ),
    Target(
        "batch size 8, bfloat16: ahead of OpenVINO",
        ratio("mistral-1b", "bfloat16", "decode 8", "OpenVINO"),
        1.0,
    ),
    Target(
        "512 tokens, bfloat16: 1.3 x transformers",
        ratio("mistral-1b", "bfloat16", "prefill 512", "transformers"),
        1.3,
    ),
    *(
        Target(
            f"512 tokens, bfloat16: ahead of {who}", ratio("mistral-1b", "bfloat16", "prefill 512", who), 1.0
        )
        for who in ("llama.cpp", "OpenVINO")
    ),
    Target(
        "8,192 tokens of the small MPT: 9 x transformers",
        ratio("mpt-small", "float32", "prefill 8192", "transformers"),
        9.0,
    ),
    Target(
        "... in a twelfth of its memory",
        ratio("mpt-small", "float32", "prefill 8192 memory", "transformers"),
        12.0,
    ),
    Target(
        "65,536 tokens of it under 3 GB",
        median("mpt-small", "float32", "prefill 65536 memory", "GB", 1e3),
        3.0,
        least=False,
    ),
    Target(
        "loading 1.1B in bfloat16: under 0.1 s",
        median("mistral-1b", "bfloat16", "load", "s"),
        0.1,
        least=False,
    ),
    Target(
        "loading float32 from bfloat16: under 2.5 s",
        _load_wide,
        2.5,
        least=False,
    ),
    Target("... with a peak under 1.1 x the weights", load_peak("mistral-1b", "float32"), 1.1, least=False),
    Target("overhead of 22 layers: 0.06 ms per layer + 0.15 ms", _overhead_at(22), 1.0, least=False),
    # Two paths with an error of one unit each can diverge at a margin of two.
    Target("tokens equal to plain PyTorch, or a tie", _tokens, 2.0, least=False),
)


def table_of(results: Results, table: Callable[..., str]) -> str:
    """Each target, the measured figure, and whether it is reached."""
    rows = []
    for target in TARGETS:
        found = target.measured(results)
        if found is None:
            rows.append([target.text, "not measured", ""])
            continue
        reached = found.value >= target.bound if target.least else found.value <= target.bound
        rows.append(
            [target.text, found.text, "yes" if reached else f"no: {number(found.value / target.bound)} of it"]
        )
    return table(["target", "measured", "reached"], rows)
