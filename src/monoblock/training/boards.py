"""The metrics of a run as TensorBoard's event files, through tensorboardX, which needs no framework."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monoblock.installed import installed

RUNS = "runs"  # the folder of event files in the output
_SKIPPED = ("step", "tokens", "seconds")


def need() -> None:
    """ImportError with the pip command if tensorboardX is not installed."""
    if not installed("tensorboardX"):
        raise ImportError(
            "report_to=tensorboard needs tensorboardX, which is not installed: pip install "
            '"monoblock[tensorboard]", or drop report_to'
        )


class TensorBoard:
    """Writes the lines of metrics.jsonl as scalars `train/...` and `eval/...`, and `train/tokens_per_second` since the
    line before."""

    def __init__(self, output: Path, step: int, tokens: int) -> None:
        """Continue after a step, until which the run had so many tokens: TensorBoard drops later events of earlier
        files."""
        need()
        first = step + 1 if step else 0
        self._writer: Any = importlib.import_module("tensorboardX").SummaryWriter(
            str(output / RUNS), purge_step=first
        )
        self._tokens, self._seconds = tokens, 0.0

    def write(self, line: Mapping[str, Any]) -> None:
        """Add the scalars of a line."""
        step = line["step"]
        for name, value in line.items():
            if name.startswith("eval_"):
                self._writer.add_scalar(f"eval/{name.removeprefix('eval_')}", value, step)
            elif name not in _SKIPPED:
                self._writer.add_scalar(f"train/{name}", value, step)
        if "seconds" in line:
            spent = line["seconds"] - self._seconds
            if spent > 0:
                rate = (line["tokens"] - self._tokens) / spent
                self._writer.add_scalar("train/tokens_per_second", rate, step)
            self._tokens, self._seconds = line["tokens"], line["seconds"]

    def flush(self) -> None:
        """Write what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Write everything, and close the file."""
        self._writer.close()
