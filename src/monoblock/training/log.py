"""The files of a run's metrics and samples: metrics.jsonl, a picture of the losses (SVG), samples.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monoblock.checkpoint.transaction import write_atomically
from monoblock.training.boards import TensorBoard

METRICS, CURVES, SAMPLES = "metrics.jsonl", "curves.svg", "samples.jsonl"

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 320, 56, 40, 28, 16
_COLOURS = {"loss": "#4269d0", "eval_loss": "#ff725c"}
_NAMES = {"loss": "training", "eval_loss": "evaluation"}
_POINTS = 400  # of a curve


class MetricsLog:
    """metrics.jsonl, or another file of that form: one object per line, each with its `step`."""

    def __init__(
        self,
        folder: Path,
        *,
        until: int,
        name: str = METRICS,
        writes: bool = True,
        board: TensorBoard | None = None,
    ) -> None:
        """Continue a file, without its lines after step `until`. `writes`: whether this process writes it. `board`
        receives each line too."""
        self.folder, self.name, self.writes, self.board = folder, name, writes, board
        self.lines: list[dict[str, Any]] = []
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        if until and path.exists():
            self.lines = [line for line in _read(path) if line["step"] <= until]
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        write_atomically(path, lambda new: new.write_text(text, encoding="utf-8"))

    def write(self, line: dict[str, Any]) -> None:
        """Append a line."""
        if not self.writes:
            return
        self.lines.append(line)
        with (self.folder / self.name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.board is not None:
            self.board.write(line)

    def close(self) -> None:
        """End the files."""
        if self.board is not None:
            self.board.close()

    def draw(self) -> None:
        """Write the picture of the losses so far."""
        if not self.writes:
            return
        new = self.folder / f".{CURVES}.new"
        new.write_text(curves(self.lines), encoding="utf-8")
        new.replace(self.folder / CURVES)  # not flushed to disk, which would take longer than drawing
        if self.board is not None:
            self.board.flush()


def _read(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file of metrics; a killed run may leave a part of one."""
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            break
        if not isinstance(value, dict) or not isinstance(value.get("step"), int):
            break
        found.append(value)
    return found


def curves(lines: Sequence[dict[str, Any]]) -> str:
    """An SVG of the training and evaluation losses by step."""
    series = {
        name: [(line["step"], line[name]) for line in lines if math.isfinite(line.get(name, math.nan))]
        for name in _COLOURS
    }
    values = [value for points in series.values() for _, value in points] or [0.0]
    steps = [step for points in series.values() for step, _ in points] or [1]
    low, high = min(values), max(values)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return _LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    for i in range(5):
        value = low + (high - low) * i / 4
        out.append(
            f'<path d="M{_LEFT} {y(value):.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>'
            f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        )
    for step in sorted({first, round((first + last) / 2), last}):
        out.append(f'<text x="{x(step):.1f}" y="{_HEIGHT - 20}" text-anchor="middle">{step}</text>')
    out.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 5}" text-anchor="middle">step</text>')
    at = _LEFT
    for name, points in series.items():
        if points:
            path = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in _thinned(points))
            colour = _COLOURS[name]
            out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            if name == "eval_loss":
                out += [
                    f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3" fill="{colour}"/>'
                    for s, v in points[-_POINTS:]
                ]
            out.append(f'<text x="{at}" y="18" fill="{colour}">{_NAMES[name]} loss</text>')
            at += 110
    return "\n".join([*out, "</svg>", ""])


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most `_POINTS` points: means of consecutive ones."""
    size = math.ceil(len(points) / _POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(s for s, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups]
