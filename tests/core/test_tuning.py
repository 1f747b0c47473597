"""The choice of how native products read their weights: with a clock of the test's own; nothing is timed."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from monoblock import native
from monoblock.cli.env import describe
from monoblock.native import tuning
from monoblock.native.tuning import Choice, WeightReading

DEFAULT = WeightReading("temporal", 2048, 2, 2)
BEST = WeightReading("non_temporal", 1024, 4, 8)
HERE = {"cpu": "a CPU", "threads": 2}


class Machine:
    """A library whose products take the time that `cost` gives, on a clock of its own, and sometimes much longer."""

    def __init__(
        self, cost: Callable[[WeightReading], float], seed: int = 0, defaults: WeightReading = DEFAULT
    ) -> None:
        self.now, self.cost, self.noise, self.products = 0.0, cost, random.Random(seed), 0
        self.plans = {(form, rows): defaults for form in native.FORMATS.values() for rows in tuning.ROWS}

    def clock(self) -> float:
        return self.now

    def mb_read_plan(self, form: int, rows: int, to: Any) -> int:
        plan = self.plans[form, rows]
        to._obj.hint, to._obj.distance = tuning.HINTS.index(plan.hint), plan.distance
        to._obj.streams, to._obj.chunks = plan.streams, plan.chunks
        return 0

    def mb_set_read_plan(self, form: int, rows: int, given: Any) -> int:
        plan = given._obj
        self.plans[form, rows] = WeightReading(
            tuning.HINTS[plan.hint], plan.distance, plan.streams, plan.chunks
        )
        return 0

    def mb_product(self, matrix: Any, _x: int, rows: int, _y: int, _threads: int) -> int:
        self.products += 1
        seconds = self.cost(self.plans[matrix._obj.format, rows]) * self.noise.uniform(1, 1.02)
        self.now += seconds * (10 if self.noise.random() < 0.05 else 1)
        return 0


def fields_right(plan: WeightReading) -> float:
    """0.4 ms, and 20% more for each field that is not `BEST`'s."""
    return 4e-4 * 1.2 ** sum(value != getattr(BEST, name) for name, value in vars(plan).items())


@pytest.fixture(autouse=True)
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "last_cache", lambda: 1 << 20)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder, and no choices from before."""
    monkeypatch.setattr(tuning, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(tuning, "_used", {})
    monkeypatch.setenv(tuning.VARIABLE, "1")
    return tmp_path / "cache"


class TestMeasure:
    def test_the_fastest_plan_is_found_in_nine_of_ten_runs_within_half_a_second(self) -> None:
        found: list[WeightReading] = []
        for seed in range(10):
            machine = Machine(fields_right, seed)
            choices = tuning.measure(machine, ["int4"], 2, clock=machine.clock)
            assert choices.keys() == {("int4", rows) for rows in tuning.ROWS}
            found.append(choices["int4", 1].plan)
            # The registers decide the streams of many rows.
            assert choices["int4", 8].plan.streams == DEFAULT.streams
            assert machine.now < 0.5
        assert found.count(BEST) >= 9

    def test_plans_that_are_as_good_leave_the_default(self) -> None:
        for seed in range(10):
            machine = Machine(lambda plan: 1e-3 * (1 - 0.01 * (plan == BEST)), seed)
            choices = tuning.measure(machine, ["int8"], 2, clock=machine.clock)
            assert {choice.plan for choice in choices.values()} == {DEFAULT}
            assert {choice.gain for choice in choices.values()} == {1.0}

    def test_the_gain_is_the_default_s_time_by_the_plan_s(self) -> None:
        machine = Machine(lambda plan: 2e-3 if plan.hint == "temporal" and plan.distance else 1e-3)
        choice = tuning.measure(machine, ["float32"], 2, clock=machine.clock)["float32", 4]
        assert choice.plan.hint == "non_temporal"
        assert choice.gain == pytest.approx(2, rel=0.05)

    def test_a_lead_that_does_not_show_twice_changes_nothing(self) -> None:
        answers = iter([[1.0, 0.5], [1.0, 1.0]])
        plan, gain = tuning.choose(DEFAULT, [[{"chunks": 8}]], lambda _: next(answers))
        assert (plan, gain) == (DEFAULT, 1.0)

    def test_the_plans_in_use_are_left_as_they_were(self) -> None:
        machine = Machine(fields_right)
        before = dict(machine.plans)
        tuning.measure(machine, native.FORMATS, 2, clock=machine.clock)
        assert machine.plans == before

    def test_every_format_is_measured_within_the_budget(self) -> None:
        machine = Machine(lambda _: 1e-4)
        choices = tuning.measure(machine, native.FORMATS, 2, clock=machine.clock)
        assert choices.keys() == {(form, rows) for form in native.FORMATS for rows in tuning.ROWS}
        assert machine.now < 0.5

    def test_the_framework_s_own_product_is_compared(self) -> None:
        machine = Machine(lambda _: 1e-3)

        def rival(form: str, rows: int, memory: tuning.SlicedMemory) -> tuning.Product | None:
            assert memory.slice(form, 3).shape == (tuning.OUTPUTS, tuning.ROW_BYTES[form])

            def product(_number: int) -> None:
                machine.now += 0.5e-3

            return product if rows == 1 else None

        choices = tuning.measure(machine, ["bfloat16"], 2, rival, machine.clock)
        lead = choices["bfloat16", 1].lead
        assert lead is not None
        assert lead == pytest.approx(0.5, rel=0.05)
        assert choices["bfloat16", 4].lead is None

    def test_slices_are_read_in_turn_from_memory_larger_than_the_last_cache(self) -> None:
        memory = tuning.SlicedMemory(tuning.OUTPUTS * tuning.ROW_BYTES["int4"])
        addresses = [memory.slice("int4", memory.turn()).ctypes.data for _ in range(4)]
        assert addresses[0] == addresses[2] != addresses[1] == addresses[3]
        assert memory.bytes.nbytes >= 2 * tuning.last_cache()


CHOICES = {("int8", 1): Choice(BEST, 1.25), ("bfloat16", 4): Choice(DEFAULT, 1.0, 1.5)}


class TestFile:
    def test_choices_are_read_as_written(self, folder: Path) -> None:
        tuning.write(HERE, CHOICES)
        assert tuning.read(HERE) == CHOICES
        assert tuning.read(HERE | {"threads": 4}) == {}
        assert [path.name for path in folder.iterdir()] == [
            tuning.path_of(HERE).name
        ]  # nothing temporary is left

    @pytest.mark.parametrize(
        "damage",
        [
            lambda _: "",
            lambda text: text[: len(text) // 2],
            lambda text: text.replace("non_temporal", "eternal"),
            lambda text: text.replace('"int8"', '"int9"'),
            lambda text: text.replace("1024", '"far"'),
            lambda text: text.replace('"chunks"', '"pieces"'),
            lambda text: text.replace('"a CPU"', '"another CPU"'),
            lambda _: "[" * 100_000,
            lambda _: "[]",
        ],
    )
    def test_a_damaged_file_is_replaced(self, folder: Path, damage: Callable[[str], str]) -> None:
        tuning.write(HERE, CHOICES)
        path = folder / tuning.path_of(HERE).name
        path.write_text(damage(path.read_text()))
        assert tuning.read(HERE) == {}
        tuning.write(HERE, CHOICES)
        assert tuning.read(HERE) == CHOICES

    def test_a_folder_that_cannot_be_written_is_no_error(
        self, folder: Path, logs: pytest.LogCaptureFixture
    ) -> None:
        folder.write_text("a file")
        tuning.write(HERE, CHOICES)
        assert tuning.read(HERE) == {}
        assert "were not kept" in logs.text

    def test_writers_at_once_leave_a_whole_file(self, folder: Path) -> None:
        threads = [threading.Thread(target=tuning.write, args=(HERE, CHOICES)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert json.loads((folder / tuning.path_of(HERE).name).read_text())["machine"] == HERE
        assert tuning.read(HERE) == CHOICES

    def test_the_folder_is_the_system_s(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(tuning.sys, "platform", "linux")
        assert tuning.cache_folder({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "monoblock"
        assert tuning.cache_folder({}) == Path.home() / ".cache" / "monoblock"
        monkeypatch.setattr(tuning.sys, "platform", "win32")
        assert tuning.cache_folder({"LOCALAPPDATA": str(tmp_path)}) == tmp_path / "monoblock"


class TestSetting:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", "on"),
            ("0", "off"),
            ("force", "force"),
            ("hint=temporal, distance=64", {"hint": "temporal", "distance": 64}),
            ("streams=4,chunks=8", {"streams": 4, "chunks": 8}),
        ],
    )
    def test_values(self, text: str, expected: object) -> None:
        assert tuning.setting(text) == expected

    @pytest.mark.parametrize("text", ["yes", "hint=eternal", "distance=-1", "chunks", "rows=2"])
    def test_other_values_are_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"MONOBLOCK_TUNE=.*expected 0, 1, force, or a plan"):
            tuning.setting(text)


class TestEnsure:
    @pytest.fixture
    def machine(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Machine:
        machine = Machine(fields_right)
        monkeypatch.setattr(native, "library", lambda: machine)
        return machine

    @staticmethod
    def large() -> int:
        return 1 << 30

    def test_measured_once_and_read_from_the_file_later(
        self, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = tuning.ensure(machine, "avx2", ["int8"], self.large, 2, clock=machine.clock)
        assert machine.plans[native.FORMATS["int8"], 1] == first["int8", 1].plan == BEST
        products = machine.products
        assert tuning.ensure(machine, "avx2", ["int8"], self.large, 2, clock=machine.clock) is first
        monkeypatch.setattr(tuning, "_used", {})  # as a later process
        machine.plans = dict.fromkeys(machine.plans, DEFAULT)
        assert tuning.ensure(machine, "avx2", ["int8"], self.large, 2, clock=machine.clock) == first
        assert machine.plans[native.FORMATS["int8"], 1] == BEST
        assert machine.products == products
        tuning.ensure(
            machine, "avx2", ["int4"], self.large, 2, clock=machine.clock
        )  # a format that is not in the file
        assert machine.products > products
        monkeypatch.setattr(tuning, "_used", {})
        assert tuning.ensure(
            machine, "avx2", ["int8", "int4"], self.large, 2, clock=machine.clock
        ).keys() == {(form, rows) for form in ("int8", "int4") for rows in tuning.ROWS}

    def test_force_measures_again(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        tuning.ensure(machine, "avx2", ["int8"], self.large, 2, clock=machine.clock)
        products = machine.products
        monkeypatch.setattr(tuning, "_used", {})
        monkeypatch.setenv(tuning.VARIABLE, "force")
        tuning.ensure(machine, "avx2", ["int8"], self.large, 2, clock=machine.clock)
        assert machine.products > products

    def test_small_models_and_0_measure_nothing(
        self, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert tuning.ensure(machine, "avx2", ["int8"], lambda: 1000, 2, clock=machine.clock) == {}
        monkeypatch.setenv(tuning.VARIABLE, "0")
        assert tuning.ensure(machine, "avx2", ["int8"], self.large, 2, clock=machine.clock) == {}
        assert not machine.products

    def test_a_plan_without_kernels_in_the_file_is_reported(
        self, machine: Machine, monkeypatch: pytest.MonkeyPatch, logs: pytest.LogCaptureFixture
    ) -> None:
        tuning.write(tuning.machine("avx2", 2), {("int8", rows): Choice(BEST, 2.0) for rows in tuning.ROWS})
        monkeypatch.setattr(machine, "mb_set_read_plan", lambda *_: 1)
        assert tuning.ensure(machine, "avx2", ["int8"], self.large, 2, clock=machine.clock) == {}
        assert "have no plan" in logs.text

    def test_products_that_the_framework_has_faster(
        self, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert machine
        monkeypatch.setattr(tuning, "_used", {2: {("float32", 4): Choice(BEST, 1.0, 0.8)}})
        assert tuning.loses("float32", 3, 2)
        assert not tuning.loses("float32", 1, 2)
        assert not tuning.loses("float32", 3, 1)


needs_library = pytest.mark.skipif(native.library() is None, reason="no native kernels")


@pytest.fixture
def library() -> Iterator[Any]:
    """The library; its plans are restored."""
    opened = native.library()
    before = {
        (form, rows): tuning.get_plan(opened, form, rows) for form in native.FORMATS for rows in tuning.ROWS
    }
    yield opened
    for (form, rows), plan in before.items():
        tuning.set_plan(opened, form, rows, plan)


@needs_library
def test_the_library_has_every_candidate(library: Any) -> None:
    for form in native.FORMATS:
        for rows in tuning.ROWS:
            default = tuning.get_plan(library, form, rows)
            for fields in (fields for group in tuning.candidates(rows) for fields in group):
                plan = replace(default, **fields)
                tuning.set_plan(library, form, rows, plan)
                assert tuning.get_plan(library, form, rows) == plan


@needs_library
@pytest.mark.parametrize(
    "fields", [{"streams": 3}, {"streams": 8}, {"chunks": 0}, {"distance": 1 << 20}, {"distance": -64}]
)
def test_the_library_refuses_other_plans(library: Any, fields: dict[str, Any]) -> None:
    before = tuning.get_plan(library, "int8", 1)
    with pytest.raises(ValueError, match="have no plan"):
        tuning.set_plan(library, "int8", 1, replace(before, **fields))
    assert tuning.get_plan(library, "int8", 1) == before


@needs_library
def test_a_plan_of_the_variable_is_set(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.VARIABLE, "hint=temporal,distance=64,streams=4,chunks=8")
    tuning.apply_setting(library)
    assert tuning.get_plan(library, "int8", 1) == WeightReading("temporal", 64, 4, 8)
    assert tuning.get_plan(library, "int8", 8).chunks == 8


@needs_library
def test_a_real_product_is_measured(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "OUTPUTS", 64)
    now = iter(range(10**9))
    choices = tuning.measure(library, native.FORMATS, 1, clock=lambda: next(now))
    assert choices.keys() == {(form, rows) for form in native.FORMATS for rows in tuning.ROWS}


@needs_library
def test_env_names_the_plans(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder
    assert "first model" in describe()["native_plans"]
    tuning.write(tuning.machine(native.level(), 1), {("int8", 4): Choice(BEST, 1.25)})
    assert describe()["native_plans"] == {
        "int8, 4 rows, 1 thread": "non-temporal prefetch of 1024 bytes, 4 streams, 8 chunks (1.25 x the default)"
    }
    monkeypatch.setenv(tuning.VARIABLE, "0")
    assert describe()["native_plans"] == "MONOBLOCK_TUNE: off"
