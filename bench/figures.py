"""Statistics of a run's results: medians, ranges, ratios of adjacent measurements, fractions of hardware limits."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

# Form of the weights -> the measured matrix rate that limits it.
RATES = {
    "float32": "float32 TFLOP/s",
    "bfloat16": "bfloat16 TFLOP/s",
    "int8": "int8 TOP/s",
    "int4": "int8 TOP/s",
}
OURS = "monoblock"
BEFORE = "monoblock, before"  # another checkout of it
LOSSLESS = "monoblock, lossless"  # bfloat16 in 12 bits
FRESH = "the memory alone"  # time of allocating the memory of a loaded model
# Resolution of measurements.
SMALLEST = {"s": 1e-3, "MB": 1.0}
# Backends that report the bytes read for a token; for the others only the size of all weights is known.
EXACT = (OURS, BEFORE, LOSSLESS, "transformers")


@dataclass(frozen=True)
class Spread:
    """A median and its range."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        if self.least == self.most:
            return number(self.median)
        return f"{number(self.median)} ({number(self.least)}-{number(self.most)})"

    @property
    def percent(self) -> str:
        """As percentages."""
        median, least, most = (f"{100 * value:.0f}" for value in (self.median, self.least, self.most))
        return f"{median}%" if least == most else f"{median}% ({least}-{most})"


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    for limit, digits in ((100, 0), (10, 1), (1, 2), (0.01, 3)):
        if abs(value) >= limit:
            return f"{value:,.{digits}f}"
    return f"{value:.4f}"


def spread(values: list[float]) -> Spread:
    """The median and range of some values."""
    return Spread(statistics.median(values), min(values), max(values))


class Results:
    """Queries on a run's JSON for tables and pictures."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    def limit(self, name: str) -> float:
        """A limit of the machine, the mean of the measurements at the start and the end."""
        return statistics.fmean(one[name] for one in self.data["limits"])

    def named(self, measure: str) -> list[dict[str, Any]]:
        """The figures of a measure that have values."""
        return [f for f in self.data["figures"] if f["measure"] == measure and f["values"]]

    def measures(self, kind: str) -> list[str]:
        """The names of the measures of a kind, without those of memory."""
        names = dict.fromkeys(f["measure"] for f in self.data["figures"] if f["values"])
        return [name for name in names if name.startswith(kind) and not name.endswith("memory")]

    def figure(self, model: str, form: str, measure: str) -> dict[str, Any] | None:
        """The figure of a measure for a model and a form of its weights."""
        wanted = (model, form, measure)
        return next(
            (f for f in self.data["figures"] if (f["model"], f["form"], f["measure"]) == wanted), None
        )

    def values(self, model: str, form: str, measure: str, who: str = OURS) -> list[float]:
        """All rounds of one backend; empty if it did not run."""
        figure = self.figure(model, form, measure)
        return figure["values"].get(who, []) if figure else []

    def ratio(self, figure: dict[str, Any], who: str, own: str = OURS) -> Spread | None:
        """Our speed divided by the backend's, per round; for seconds and MB the backend's value divided by ours."""
        ours, theirs = figure["values"].get(own, []), figure["values"].get(who, [])
        if who == own or not ours or not theirs:
            return None
        pairs = list(zip(ours, theirs, strict=False))
        more_is_better = figure["unit"] == "tok/s"
        return spread([a / b if more_is_better else b / max(a, SMALLEST[figure["unit"]]) for a, b in pairs])

    def read_bytes(self, model: str, form: str, who: str) -> float | None:
        """Bytes of weights read for a token."""
        size = self.data["weights"].get(f"{model} {form}", {}).get(who)
        counts = self.data["blocks"].get(model)
        if size is None or who in EXACT or not counts or not counts["head"]:
            return size
        return size * (1 - counts["table"] / sum(counts.values()))

    def bandwidth_share(self, figure: dict[str, Any], who: str) -> Spread | None:
        """Fraction of the bandwidth used for reading weights at batch size 1, per round, relative to the bandwidth
        measured directly before and after."""
        size = self.read_bytes(figure["model"], figure["form"], who)
        if size is None or figure["measure"] != "decode 1":
            return None
        rounds = zip(figure["values"][who], figure["read GB/s"][who], strict=True)
        return spread([size * speed / 1e9 / read for speed, read in rounds])

    def reads(self, figures: list[dict[str, Any]]) -> Spread:
        """Read bandwidth in GB/s measured between the decoding runs, over all rounds."""
        return spread(
            [read for figure in figures for reads in figure["read GB/s"].values() for read in reads]
        )

    def matrix_share(self, figure: dict[str, Any], who: str) -> Spread | None:
        """Fraction of the measured matrix rate reached in prefill, counting the matrices of the blocks only."""
        counts = self.data["blocks"].get(figure["model"])
        if not counts:
            return None
        each = 2e-12 * counts["blocks"] / self.limit(RATES[figure["form"]])
        return spread([each * speed for speed in figure["values"][who]])
