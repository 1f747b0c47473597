"""A few hostile inputs for every reader; `make fuzz` runs 20,000 of each."""

from __future__ import annotations

import importlib.util

import pytest
from fuzz.harness import attempt
from readers import READERS, Reader, prepared

LIGHT, HEAVY = 120, 30  # inputs


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_no_input_fails(reader: Reader) -> None:
    """It is read, or refused by an error of ours, within the time and the memory."""
    if missing := [name for name in reader.needs if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    failed: list[str] = []
    with prepared(reader) as ready:
        for number in range(HEAVY if reader.heavy else LIGHT):
            folder, restore, size = ready.spoilt(number)
            ended = attempt(lambda folder=folder: ready.read(folder), size=size)
            restore()
            if ended.kind == "failed":
                failed.append(f"{number}: {ended.what}")
    assert failed == []
