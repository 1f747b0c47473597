"""What can be read off the results of a run: medians, ranges, ratios of neighbours in time, shares of the limits."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

# Which of the measured matrix rates a form of the weights is held against.
RATES = {
    "float32": "float32 TFLOP/s",
    "bfloat16": "bfloat16 TFLOP/s",
    "int8": "int8 TOP/s",
    "int4": "int8 TOP/s",
}
OURS = "monoblock"
BEFORE = "monoblock, before"  # another checkout of it
LOSSLESS = "monoblock, lossless"  # bfloat16 in 12 bits
FRESH = "the memory alone"  # how long the system takes to give what a loaded model needs
# Less than this is not told from nothing.
SMALLEST = {"s": 1e-3, "MB": 1.0}
# Backends that say what a token reads; of the others only the size of all weights is known.
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
        """The same of a share."""
        median, least, most = (f"{100 * value:.0f}" for value in (self.median, self.least, self.most))
        return f"{median}%" if least == most else f"{median}% ({least}-{most})"


def number(value: float) -> str:
    """Three digits, without an exponent."""
    for limit, digits in ((100, 0), (10, 1), (1, 2), (0.01, 3)):
        if abs(value) >= limit:
            return f"{value:,.{digits}f}"
    return f"{value:.4f}"


def spread(values: list[float]) -> Spread:
    """The median and range of some values."""
    return Spread(statistics.median(values), min(values), max(values))


class Results:
    """A run's JSON with questions that tables and pictures ask."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    def limit(self, name: str) -> float:
        """A limit of the machine, the mean of start and end."""
        return statistics.fmean(one[name] for one in self.data["limits"])

    def named(self, measure: str) -> list[dict[str, Any]]:
        """The figures of one measure, those with values."""
        return [f for f in self.data["figures"] if f["measure"] == measure and f["values"]]

    def measures(self, kind: str) -> list[str]:
        """The names of the measures that begin so, without those of memory."""
        names = dict.fromkeys(f["measure"] for f in self.data["figures"] if f["values"])
        return [name for name in names if name.startswith(kind) and not name.endswith("memory")]

    def figure(self, model: str, form: str, measure: str) -> dict[str, Any] | None:
        """What was measured of a model in a form."""
        wanted = (model, form, measure)
        return next(
            (f for f in self.data["figures"] if (f["model"], f["form"], f["measure"]) == wanted), None
        )

    def values(self, model: str, form: str, measure: str, who: str = OURS) -> list[float]:
        """All rounds of one backend; empty if it did not run."""
        figure = self.figure(model, form, measure)
        return figure["values"].get(who, []) if figure else []

    def ratio(self, figure: dict[str, Any], who: str, own: str = OURS) -> Spread | None:
        """How many times what the backend has is ours, round by round; of seconds and MB the other way round."""
        ours, theirs = figure["values"].get(own, []), figure["values"].get(who, [])
        if who == own or not ours or not theirs:
            return None
        pairs = list(zip(ours, theirs, strict=False))
        more_is_better = figure["unit"] == "tok/s"
        return spread([a / b if more_is_better else b / max(a, SMALLEST[figure["unit"]]) for a, b in pairs])

    def read_bytes(self, model: str, form: str, who: str) -> float | None:
        """Bytes of weights that making a token reads."""
        size = self.data["weights"].get(f"{model} {form}", {}).get(who)
        parts = self.data["blocks"].get(model)
        if size is None or who in EXACT or not parts or not parts["head"]:
            return size
        return size * (1 - parts["table"] / sum(parts.values()))

    def bandwidth_share(self, figure: dict[str, Any], who: str) -> Spread | None:
        """Part of the bandwidth that decoding one text reaches by reading weights, round by round: of what was measured
        right before and after it."""
        size = self.read_bytes(figure["model"], figure["form"], who)
        if size is None or figure["measure"] != "decode 1":
            return None
        rounds = zip(figure["values"][who], figure["read GB/s"][who], strict=True)
        return spread([size * speed / 1e9 / read for speed, read in rounds])

    def reads(self, figures: list[dict[str, Any]]) -> Spread:
        """GB/s that the memory was read with beside decoding, all rounds."""
        return spread(
            [read for figure in figures for reads in figure["read GB/s"].values() for read in reads]
        )

    def matrix_share(self, figure: dict[str, Any], who: str) -> Spread | None:
        """Part of the measured matrix rate that a prompt reaches by the blocks' matrices alone."""
        parts = self.data["blocks"].get(figure["model"])
        if not parts:
            return None
        each = 2e-12 * parts["blocks"] / self.limit(RATES[figure["form"]])
        return spread([each * speed for speed in figure["values"][who]])
