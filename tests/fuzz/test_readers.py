"""A sample of fuzzed inputs for every reader; `make fuzz` runs 20,000 of each."""

from __future__ import annotations

import importlib.util

import pytest
from fuzz.harness import attempt
from readers import READERS, Reader, prepared

LIGHT, HEAVY = 120, 30  # inputs


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_fuzzed_inputs_are_read_or_refused(reader: Reader) -> None:
    """Within the limits of time and memory."""
    if missing := [name for name in reader.needs if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    failed: list[str] = []
    with prepared(reader) as ready:
        for number in range(HEAVY if reader.heavy else LIGHT):
            folder, restore, size = ready.mutated(number)
            outcome = attempt(lambda folder=folder: ready.read(folder), size=size)
            restore()
            if outcome.kind == "failed":
                failed.append(f"{number}: {outcome.what}")
    assert failed == []
