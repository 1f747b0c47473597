"""`tools/mutate.py` makes the mutants that it promises, of files and tests that exist."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("mutate", ROOT / "tools" / "mutate.py")
assert SPEC is not None and SPEC.loader is not None
mutate: Any = importlib.util.module_from_spec(SPEC)
sys.modules["mutate"] = mutate  # dataclasses look their module up
SPEC.loader.exec_module(mutate)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a + b", {"x = a - b", "x = a"}),
        ("x = a < b", {"x = a <= b"}),
        ("x = a and b", {"x = a or b", "x = a"}),
        ("x = not a", {"x = a"}),
        ("x = f(a, bias=b)", {"x = f(a)"}),
        ("x = a if b else c", {"x = a", "x = c"}),
        ("x = True", {"x = False"}),
        ("x = 4", {"x = 5"}),
        ("x: Literal[1]", set()),
        ("raise ValueError(1 + 2)", set()),
        ("x = f'{a + b}'", set()),
        ("x = 'a' + b", set()),
    ],
)
def test_changes_of_an_expression(source: str, expected: set[str], tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    assert {mutant.source() for mutant in mutate.mutants_of(path, "spec")} == expected


def test_targets_exist_and_have_mutants() -> None:
    for group, (patterns, tests) in mutate.TARGETS.items():
        for pattern in patterns:
            paths = list(mutate.SOURCES.glob(pattern))
            assert paths and any(mutate.mutants_of(path, group) for path in paths), pattern
        assert all((ROOT / test).exists() for test in tests), tests


def test_equivalent_mutants_are_still_made() -> None:
    """An entry that matches nothing would hide a mutant of later sources."""
    names = {
        mutant.name
        for group, (patterns, _) in mutate.TARGETS.items()
        for pattern in patterns
        for path in mutate.SOURCES.glob(pattern)
        for mutant in mutate.mutants_of(path, group)
    }
    assert mutate.EQUIVALENT.keys() <= names


def test_drawn_mutants_are_of_all_groups_and_repeatable() -> None:
    drawn = mutate.chosen(50, seed=3, only=None)
    assert len(drawn) == 50 and drawn == mutate.chosen(50, seed=3, only=None)
    assert {mutant.group for mutant in drawn} == mutate.TARGETS.keys()
