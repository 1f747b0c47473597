"""A save leaves the whole old model or the whole new one: killed anywhere, beside others, on a full disk."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import kill_points
import pytest
import saves_made as made
from saves_made import CASES, Case

from monoblock.checkpoint import transaction
from monoblock.checkpoint.transaction import staged, write_atomically
from monoblock.errors import CheckpointError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a folder is exchanged, and processes fork")

SAMPLE = 9  # kill points of a case; `make fuzz` takes all


def spread(count: int, most: int) -> list[int]:
    """So many of the numbers up to `count`, evenly, the first and the last among them."""
    return sorted({round(i * count / (most - 1)) for i in range(most)})


@pytest.mark.parametrize("name", CASES)
def test_how_a_save_comes_there(tmp_path: Path, name: str) -> None:
    """The cases below are what they say they are."""
    case = CASES[name]
    folder = case.made(tmp_path / "place" / "model")
    found = kill_points.operations(lambda: case.do(folder))
    assert ("exchange" in found) == (case.by == "exchange")
    assert made.model_in(folder) == 2
    assert not made.litter(folder)
    for other, text in case.others.items():
        assert (folder / other).is_file() == case.stays
        assert not case.stays or (folder / other).read_text() == text


@pytest.mark.parametrize("name", CASES)
def test_killed(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    folder = tmp_path / "place" / "model"
    case.made(folder)
    count = len(kill_points.operations(lambda: case.do(folder)))
    for at in spread(count, SAMPLE):
        case.made(folder)
        assert kill_points.killed(lambda: case.do(folder), at) == (at < count)
        case.check(folder)
