"""Chooses how the native products read their weights, by measurement on this machine. Imports no framework.

A product with few rows of inputs takes as long as its weights take to be read, and the fastest way to read them
depends on the CPU: the software prefetch (its hint and its distance), the number of rows of weights that are read in
parallel, and the chunks that a thread's outputs are divided into. The first model whose weights are larger than the
last cache has them measured, in under half a second; the choice is kept in the user's cache folder, for this CPU,
number of threads and version of the library. The results of a product have the same bits for every choice.

`MONOBLOCK_TUNE`: `0` measures nothing and uses the defaults of the CPU's vendor; `force` measures in each process, and
writes the file again; `hint=temporal,distance=1024,streams=4,chunks=2`, or some of these, sets a plan for all products.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from ctypes import byref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from monoblock.native import abi, build

logger = logging.getLogger("monoblock")

VARIABLE = "MONOBLOCK_TUNE"
HINTS = ("temporal", "non_temporal")
# Rows of inputs that stand for the classes of read_plan.hpp: one, two to four, and more.
ROWS = (1, 4, 8)
BUDGET = 0.3  # seconds of measurement, of all formats of a model
ROUNDS = (
    3  # wanted measurements of each plan; the shortest counts, since others include what else the machine did
)
MARGIN = 1.03  # plans that differ by less are as good, and the first is taken, so that noise does not decide
INPUTS, OUTPUTS = 2048, 4096  # of the matrices that are multiplied, as in a model of 1 billion parameters
# Bytes of a row of such a matrix.
ROW_BYTES = {
    "float32": 4 * INPUTS,
    "bfloat16": 2 * INPUTS,
    "int8": INPUTS,
    "int4": INPUTS // 2,
    "lossless": INPUTS // 64 + INPUTS // 2 * 3,
}
GROUP = 128  # weights of a quantised format that share a scale
LAST_CACHE = 32 << 20  # bytes, where the system does not say
MOST_MEMORY = 256 << 20  # bytes that are read in turn at most


@dataclass(frozen=True)
class WeightReading:
    """A plan: how a product reads its weights: `ReadPlan` of read_plan.hpp.

    `hint`: of the software prefetch; `distance`: its bytes; `streams`: rows of weights that are read in parallel;
    `chunks`: of a thread's outputs.
    """

    hint: str
    distance: int
    streams: int
    chunks: int

    def __str__(self) -> str:
        ahead = (
            f"{self.hint.replace('_', '-')} prefetch of {self.distance} bytes"
            if self.distance
            else "no prefetch"
        )
        return f"{ahead}, {self.streams} streams, {self.chunks} chunks"


@dataclass(frozen=True)
class Choice:
    """The plan of a format and a class of rows, its speed relative to the default plan's, and to that of the
    framework's own product (None: not measured)."""

    plan: WeightReading
    gain: float
    lead: float | None = None

    def __str__(self) -> str:
        return f"{self.plan} ({self.gain:.2f} x the default)"


# Fields of a plan.
Fields = dict[str, Any]
# By format and rows.
Choices = dict[tuple[str, int], Choice]
# A product to be timed: the number of the slice of memory that it reads, which rotates.
Product = Callable[[int], object]
# The framework's own product with weights of a format and a number of rows, over the slices of a `SlicedMemory`; None
# if it has none.
Rival = Callable[[str, int, "SlicedMemory"], Product | None]


# ---------------------------------------------------------------------------- the choice


def candidates(rows: int) -> list[list[Fields]]:
    """Fields of plans to compare, in groups: the best of a group is the base of the next one (`choose`)."""
    reads = [
        {"hint": hint, "distance": distance} for distance in (3072, 2048, 1024) for hint in reversed(HINTS)
    ]
    groups: list[list[Fields]] = [[*reads, {"distance": 0}]]
    if rows <= ROWS[1]:  # with more rows, the registers decide
        groups.append([{"streams": streams} for streams in (2, 4)])
    return [*groups, [{"chunks": chunks} for chunks in (2, 4, 8)]]


def choose(
    default: WeightReading,
    groups: Sequence[Sequence[Fields]],
    times: Callable[[Sequence[WeightReading]], Sequence[float]],
) -> tuple[WeightReading, float]:
    """The best plan and its speed relative to the default one.

    `times` gives the seconds of several plans, measured in turn. Each group sets some fields of the best plan so far.
    Of the plans that are within `MARGIN` of the fastest the first is taken, and the best plan so far comes first. The
    last one is compared with the default plan once more, which stays if the lead does not show again.
    """
    best = default
    for group in groups:
        plans = list(dict.fromkeys([best, *(replace(best, **fields) for fields in group)]))
        seconds = times(plans)
        limit = min(seconds) * MARGIN
        best = next(plan for plan, own in zip(plans, seconds, strict=True) if own <= limit)
    if best == default:
        return default, 1.0
    before, after = times([default, best])
    return (best, before / after) if before > after * MARGIN else (default, 1.0)


def shortest(runs: Sequence[Callable[[], object]], seconds: float, clock: Callable[[], float]) -> list[float]:
    """The shortest time of each of the runs, which alternate for this many seconds, or twice as many until there were
    `ROUNDS` of them. A run before the first measured one wakes the threads."""
    best = [float("inf")] * len(runs)
    runs[0]()
    start, rounds = clock(), 0
    while not rounds or clock() - start < seconds * (1 if rounds >= ROUNDS else 2):
        for i, run in enumerate(runs):
            begin = clock()
            run()
            best[i] = min(best[i], clock() - begin)
        rounds += 1
    return best


def measure(
    library: Any,
    formats: Iterable[str],
    threads: int,
    rival: Rival | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Choices:
    """Measure the plans of these formats, of which one is in use already, and leave that in use."""
    wanted = sorted(set(formats), key=list(ROW_BYTES).index)
    memory = SlicedMemory(max(OUTPUTS * ROW_BYTES[form] for form in wanted))
    return {
        (form, rows): _measure(
            memory, library, form, rows, threads, rival, BUDGET / len(wanted) / len(ROWS), clock
        )
        for form in wanted
        for rows in ROWS
    }


def _measure(
    memory: SlicedMemory,
    library: Any,
    form: str,
    rows: int,
    threads: int,
    rival: Rival | None,
    seconds: float,
    clock: Callable[[], float],
) -> Choice:
    default, groups = get_plan(library, form, rows), candidates(rows)
    product = memory.product(library, form, rows, threads)
    theirs = None if rival is None else rival(form, rows, memory)
    each = seconds / (sum(map(len, groups)) + 2 + (0 if theirs is None else 2))

    def run(plan: WeightReading) -> None:
        set_plan(library, form, rows, plan)
        product(memory.turn())

    def times(plans: Sequence[WeightReading]) -> list[float]:
        return shortest([lambda plan=plan: run(plan) for plan in plans], each * len(plans), clock)

    try:
        best, gain = choose(default, groups, times)
        lead = None
        if theirs is not None:
            own, other = shortest([lambda: run(best), lambda: theirs(memory.turn())], each * 2, clock)
            lead = round(other / own, 3)
        return Choice(best, round(gain, 3), lead)
    finally:
        set_plan(library, form, rows, default)


class SlicedMemory:
    """Memory larger than the last cache, whose slices are read in turn as weights, so that none is in a cache."""

    def __init__(self, slice_bytes: int) -> None:
        import numpy as np

        size = max(2 * last_cache(), 2 * slice_bytes)
        self.bytes = np.full(min(size, max(MOST_MEMORY, 2 * slice_bytes)) + 64, 0x3C, np.uint8)
        self.bytes = self.bytes[-self.bytes.ctypes.data % 64 :]  # values of 0.01 in float32 and bfloat16
        self.scales = np.full((OUTPUTS, INPUTS // GROUP), 0.01, np.float16)
        self.number = 0

    def turn(self) -> int:
        """The number of the next slice."""
        self.number += 1
        return self.number

    def slice(self, form: str, number: int) -> Any:
        """A slice as bytes (outputs, bytes of a row)."""
        size = OUTPUTS * ROW_BYTES[form]
        first = number % (len(self.bytes) // size) * size
        return self.bytes[first : first + size].reshape(OUTPUTS, ROW_BYTES[form])

    def product(self, library: Any, form: str, rows: int, threads: int) -> Product:
        """The library's product with this many rows of ones, without a bias."""
        import numpy as np

        x, y = np.ones((rows, INPUTS), np.float32), np.empty((rows, OUTPUTS), np.float32)
        quantised = form in ("int8", "int4")
        scales = self.scales.ctypes.data if quantised else None
        count = len(self.bytes) // (OUTPUTS * ROW_BYTES[form])
        matrices: list[Any] = []
        for number in range(count):
            data = self.slice(form, number)
            if form == "lossless":  # headers: the highest exponent, and no outliers
                data[:, :4] = np.array([120, 0], np.uint16).view(np.uint8)
            matrices.append(
                abi.Matrix(
                    data=data.ctypes.data,
                    scale=scales,
                    low=scales if form == "int4" else None,
                    outputs=OUTPUTS,
                    inputs=INPUTS,
                    format=abi.FORMATS[form],
                    group=GROUP if quantised else 0,
                )
            )

        def run(number: int) -> None:
            matrix = matrices[number % count]
            if library.mb_product(byref(matrix), x.ctypes.data, rows, y.ctypes.data, threads):
                raise MemoryError("no memory for the inputs of a product")

        return run


def last_cache() -> int:
    """Bytes of the last cache."""
    sizes: list[int] = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text(encoding="ascii").strip()
            sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0))
    return max(sizes, default=LAST_CACHE)


def get_plan(library: Any, form: str, rows: int) -> WeightReading:
    """The plan in use."""
    plan = abi.ReadPlan()
    if library.mb_read_plan(abi.FORMATS[form], rows, byref(plan)):
        raise ValueError(f"no plan for {form} with {rows} rows")
    return WeightReading(HINTS[plan.hint], plan.distance, plan.streams, plan.chunks)


def set_plan(library: Any, form: str, rows: int, plan: WeightReading) -> None:
    """Use this plan from now on. ValueError: the library has no such kernel."""
    given = abi.ReadPlan(HINTS.index(plan.hint), plan.distance, plan.streams, plan.chunks)
    if library.mb_set_read_plan(abi.FORMATS[form], rows, byref(given)):
        raise ValueError(f"the native kernels have no plan {plan} for {form} with {rows} rows")


# ---------------------------------------------------------------------------- the file


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of the user's cache for this package."""
    if sys.platform == "win32":
        home = Path(environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        home = Path.home() / "Library" / "Caches"
    else:
        home = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "monoblock"


def machine(level: str | None, threads: int) -> dict[str, Any]:
    """What a choice holds for."""
    return {
        "cpu": cpu_name(),
        "cache": last_cache(),
        "threads": threads,
        "level": level,
        "library": build.digest(),
    }


def cpu_fields() -> dict[str, str]:
    """The fields of the first CPU in /proc/cpuinfo; none on systems other than Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    fields = dict[str, str]()
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def cpu_name() -> str:
    """The CPU's model."""
    import platform

    fields = cpu_fields()
    # Clouds give several models one name.
    names = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part")
    found = [fields[name] for name in names if name in fields]
    return " ".join(found) or platform.processor() or platform.machine()


def path_of(here: Mapping[str, Any]) -> Path:
    """The file of a machine's choices."""
    key = hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / f"tuning-{key}.json"


def read(here: Mapping[str, Any]) -> Choices:
    """The choices in the file; none if there is no file, or a damaged one."""
    try:
        held = json.loads(path_of(here).read_text(encoding="utf-8"))
        if held["machine"] != here:
            return {}
        found: Choices = {}
        for entry in held["choices"]:
            plan = WeightReading(entry["hint"], entry["distance"], entry["streams"], entry["chunks"])
            if plan.hint not in HINTS or entry["format"] not in ROW_BYTES or entry["rows"] not in ROWS:
                return {}
            if not all(type(n) is int for n in (plan.distance, plan.streams, plan.chunks)):
                return {}
            lead = entry["lead"]
            found[entry["format"], entry["rows"]] = Choice(
                plan, float(entry["gain"]), None if lead is None else float(lead)
            )
        return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def write(here: Mapping[str, Any], choices: Choices) -> None:
    """Write the choices, atomically. A folder that cannot be written is no error: they are measured again next time."""
    path = path_of(here)
    entries = [
        {"format": form, "rows": rows, **vars(choice.plan), "gain": choice.gain, "lead": choice.lead}
        for (form, rows), choice in sorted(choices.items())
    ]
    text = json.dumps({"machine": dict(here), "choices": entries}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tuning-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink()
            raise
    except OSError as error:
        logger.info("the measured plans of native products were not kept: %s", error)


# ---------------------------------------------------------------------------- use

_lock = threading.Lock()
_used: dict[int, Choices] = {}  # by the number of threads


def setting(text: str | None = None) -> str | dict[str, Any]:
    """`MONOBLOCK_TUNE`: "on", "off", "force", or the fields of a plan. ValueError: none of these."""
    text = (os.environ.get(VARIABLE, "") if text is None else text).strip().lower()
    if text in ("", "1", "on"):
        return "on"
    if text in ("0", "off", "no", "false"):
        return "off"
    if text == "force":
        return text
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = (side.strip() for side in part.partition("="))
        if name == "hint" and value in HINTS:
            found[name] = value
        elif name in ("distance", "streams", "chunks") and value.isdecimal():
            found[name] = int(value)
        else:
            raise ValueError(
                f"{VARIABLE}={text!r}: expected 0, 1, force, or a plan such as "
                f"hint={HINTS[0]},distance=1024,streams=4,chunks=2"
            )
    return found


def ensure(
    library: Any,
    level: str | None,
    formats: Iterable[str],
    weight_bytes: Callable[[], int],
    threads: int,
    rival: Rival | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Choices:
    """The plans of these formats are in use after this call: those of the file, or measured now.

    `library`, `level`: the opened library and its instruction set; `weight_bytes`: of the model; weights that fit the
    last cache are not read from memory, and nothing is measured.
    Returns the choices that are known for this number of threads.
    """
    with _lock:
        known = _used.setdefault(threads, {})
        missing = {form for form in formats if form in ROW_BYTES and (form, ROWS[0]) not in known}
        chosen = setting()
        if not missing or chosen not in ("on", "force") or weight_bytes() <= last_cache():
            return known
        here = machine(level, threads)
        held = {} if chosen == "force" else read(here)
        if unmeasured := {form for form in missing if any((form, rows) not in held for rows in ROWS)}:
            begin = clock()
            held |= measure(library, unmeasured, threads, rival, clock)
            write(here, read(here) | held)
            logger.info(
                "measured how native products of %s read their weights: %.2f s, kept in %s",
                ", ".join(sorted(unmeasured)),
                clock() - begin,
                path_of(here),
            )
        for (form, rows), choice in held.items():
            try:
                set_plan(library, form, rows, choice.plan)
            except ValueError as error:  # the file was edited
                logger.warning("%s: %s", path_of(here), error)
                continue
            known[form, rows] = choice
        return known


def loses(form: str, rows: int, threads: int) -> bool:
    """Whether the framework's own product was measured to be faster than the library's."""
    number = next((own for own in ROWS if rows <= own), ROWS[-1])
    choice = _used.get(threads, {}).get((form, number))
    return choice is not None and choice.lead is not None and choice.lead * MARGIN < 1


def apply_setting(library: Any) -> None:
    """Set the plan that `MONOBLOCK_TUNE` names, if it names one. ValueError: the library has no such kernels."""
    if isinstance(chosen := setting(), dict):
        force(library, chosen)


def force(library: Any, fields: Mapping[str, Any]) -> None:
    """Set these fields of all plans. ValueError: the library has no such kernels. The number of streams is that of up
    to four rows of inputs."""
    for form in ROW_BYTES:
        for rows in ROWS:
            own = {name: value for name, value in fields.items() if name != "streams" or rows <= ROWS[1]}
            set_plan(library, form, rows, replace(get_plan(library, form, rows), **own))


def stored(level: str | None) -> dict[int, Choices]:
    """The choices in the files of this machine, by number of threads."""
    here = machine(level, 0)
    found = {threads: read(here | {"threads": threads}) for threads in range(1, (os.cpu_count() or 1) + 1)}
    return {threads: choices for threads, choices in found.items() if choices}
