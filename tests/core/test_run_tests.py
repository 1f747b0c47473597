"""tools/run_tests.py runs every folder of tests, sums their counts, and fails if one of its processes fails."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("run_tests", ROOT / "tools" / "run_tests.py")
assert SPEC is not None
assert SPEC.loader is not None
run_tests: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(run_tests)

# Folders that need another environment or more time, and have their own target in the Makefile.
OTHER_TARGETS = {"tests/distributed", "tests/ecosystem"}


def test_every_folder_of_tests_is_run() -> None:
    folders = {f"tests/{path.parent.name}" for path in (ROOT / "tests").glob("*/test_*.py")}
    assert {folder for part in run_tests.PARTS.values() for folder in part} == folders - OTHER_TARGETS
    assert not list((ROOT / "tests").glob("test_*.py"))


def test_the_summary_has_the_format_of_pytest() -> None:
    counts = Counter({"passed": 6321, "failed": 1, "skipped": 30})
    assert run_tests.summary(counts, 650.1) == "1 failed, 6321 passed, 30 skipped in 650.10s (0:10:50)"


@pytest.mark.parametrize(
    ("statuses", "expected", "last"),
    [
        ({}, 0, "12 passed"),
        ({"flax": 1}, 1, "1 failed, 11 passed"),
        ({"tf": run_tests.NO_TESTS}, 0, "10 passed"),
        ({"torch": -9}, 1, "10 passed, 1 error"),  # killed before it wrote its counts
        (dict.fromkeys(run_tests.PARTS, run_tests.NO_TESTS), 1, "no tests ran"),
    ],
    ids=["all pass", "one fails", "one is empty", "one is killed", "all are empty"],
)
def test_one_failed_part_fails_the_run(
    statuses: dict[str, int],
    expected: int,
    last: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All parts run even if one fails."""
    ran: list[str] = []

    def run(part: str, command: list[str], counts: Path, failures: list[str]) -> int:
        assert command[-len(run_tests.PARTS[part]) - 1 :] == [*run_tests.PARTS[part], "-x"]
        ran.append(part)
        assert not failures
        status = statuses.get(part, 0)
        if status in (0, 1):
            counts.write_text(json.dumps({"passed": 2 - status, **({"failed": 1} if status else {})}))
        return status

    monkeypatch.setattr(run_tests, "run", run)
    assert run_tests.main(["--jobs", "1", "-x"]) == expected
    assert ran == list(run_tests.PARTS)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{last} in ")


@pytest.mark.parametrize("broken", [None, *run_tests.CHECKS])
def test_type_checks_and_core_tests_without_frameworks(
    broken: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: dict[str, list[str]] = {}

    def run(part: str, command: list[str], counts: Path, failures: list[str]) -> int:
        commands[part] = command
        failures.append(f"{part} | FAILED a test")
        if part != "types":
            counts.write_text(json.dumps({"passed": 1}))
        return int(part == broken)

    monkeypatch.setattr(run_tests, "run", run)
    assert run_tests.main(["--bare", "other/python", "-x"]) == int(broken is not None)
    assert ("bare | FAILED a test" in capsys.readouterr().out) == (broken is not None)
    assert commands.keys() == {*run_tests.PARTS, "types", "bare"}
    assert commands["bare"] == ["other/python", "-u", "-m", "pytest", "tests/core", "-x"]
    assert "pyright" in commands["types"]
    assert "-x" not in commands["types"]


def test_environment_and_output_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MONOBLOCK_TEST_NO_FRAMEWORK", raising=False)
    code = "import os; print('FAILED', os.environ.get('MONOBLOCK_TEST_NO_FRAMEWORK')); raise SystemExit(3)"
    for part, expected in (("bare", "1"), ("core", "None")):
        failures: list[str] = []
        assert run_tests.run(part, [sys.executable, "-c", code], tmp_path / "counts", failures) == 3
        assert capsys.readouterr().out == f"{part:6} | FAILED {expected}\n"
        assert failures == [f"{part:6} | FAILED {expected}"]
