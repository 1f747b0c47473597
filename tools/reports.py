"""What the tools that train the package's models share: the time of a training command, and generated sections."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch


class Clock:
    """Writes the processor time of the child processes that end in its block, added to that of earlier runs."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> None:
        self.before = os.times()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        now = os.times()
        spent = sum(getattr(now, n) - getattr(self.before, n) for n in ("children_user", "children_system"))
        if self.file.exists():
            spent += json.loads(self.file.read_text(encoding="utf-8"))["processor"]
        count = int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))
        threads = "one thread" if count == 1 else f"{count} threads"
        facts = {"processor": spent, "threads": threads, "python": sys.version.split()[0]}
        self.file.write_text(json.dumps(facts) + "\n", encoding="utf-8")


def replace_section(page: Path, name: str, text: str) -> None:
    """Replace what is between the comments of that name."""
    begin, end = (f"<!-- {name}: {which} -->\n" for which in ("begin", "end"))
    content = page.read_text(encoding="utf-8")
    before, rest = content.split(begin)
    _, after = rest.split(end)
    page.write_text(before + begin + text + "\n" + end + after, encoding="utf-8")
