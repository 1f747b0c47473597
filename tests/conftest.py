"""Fixtures and hooks of all tests. Imports no framework, so that the core's tests run without one."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import resource
import signal
import sys
from pathlib import Path

import pytest

from monoblock import native
from monoblock.config import PretrainedConfig
from monoblock.native import build

pytest.register_assert_rewrite("contract")
# Tests measure nothing, also not in the processes that they start.
os.environ.setdefault("MONOBLOCK_TUNE", "0")
# Background jobs of a shell ignore SIGINT, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Limit on the peak memory of a test process, in bytes, so that the suite runs on a machine of 8 GB.
MAX_MEMORY = 4 << 30


def free_memory() -> None:
    """Clears the frameworks' caches of compiled programs and graphs, and returns freed pages to the system."""
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
    if keras := sys.modules.get("keras"):
        keras.backend.clear_session()
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
    gc.collect()
    gc.freeze()  # the remaining objects are modules and caches; later collections skip them
    if sys.platform == "linux":  # glibc retains freed pages; other C libraries have no such function
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def pytest_configure() -> None:
    """Imports create almost no garbage."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Garbage is collected between tests only, and imported modules are skipped: automatic collections take an eighth
    of the time in which TensorFlow traces graphs."""
    gc.collect()
    gc.freeze()


def peak_memory() -> int:
    """The peak memory of this process and of its children, in bytes."""
    processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = max(resource.getrusage(which).ru_maxrss for which in processes)
    return peak if sys.platform == "darwin" else peak << 10


@pytest.fixture(autouse=True, scope="module")
def _free_memory_after_module():
    """Programs compiled by the tests of a file are not kept for the next file."""
    yield
    free_memory()


@pytest.fixture(autouse=True)
def _fresh_warnings():
    """Unknown fields are logged once in a process; each test starts with none logged."""
    PretrainedConfig._warned.clear()


@pytest.fixture(autouse=True)
def _collect_garbage():
    """Reference cycles are collected once there are more than 300,000 tracked objects."""
    yield
    gc.disable()  # some libraries enable it
    if gc.get_count()[0] > 300_000:
        gc.collect()


@pytest.fixture
def logs(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Captures monoblock's log records from INFO on; `logs.messages` has the messages."""
    caplog.set_level(logging.INFO, logger="monoblock")
    return caplog


@pytest.fixture(params=[*build.levels(), "0"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The instruction set of the native kernels during the test; `0`: without native kernels."""
    found = native.choose(request.param)
    if request.param != "0" and found[1] != request.param:
        pytest.skip(f"native kernels: {found[2]}")
    monkeypatch.setattr(native, "_opened", lambda: found)
    return request.param


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process whose peak memory is above the limit fails even if its tests pass."""
    if peak_memory() > MAX_MEMORY and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter) -> None:
    _write_counts(terminalreporter)
    peak = peak_memory() / 2**30
    if peak_memory() > MAX_MEMORY:
        terminalreporter.write_line(
            f"FAILED: a test process used {peak:.1f} GiB, more than {MAX_MEMORY >> 30}; see free_memory()",
            red=True,
        )
    else:
        terminalreporter.write_line(f"peak memory: {peak:.1f} GiB")
    _write_differences(terminalreporter)


def _write_counts(terminalreporter) -> None:
    """Writes the number of tests by outcome, for tools/run_tests.py."""
    if path := os.environ.get("MONOBLOCK_TEST_COUNTS"):
        stats = terminalreporter.stats
        Path(path).write_text(
            json.dumps({outcome: len(tests) for outcome, tests in stats.items() if outcome})
        )


def _write_differences(terminalreporter) -> None:
    """With -vv (`-q` is the default): the measured differences and their bounds, by descending ratio."""
    if terminalreporter.config.get_verbosity() < 1:
        return
    import measure

    if measure.WORST:
        terminalreporter.section("largest differences relative to their bounds")
        ratios = {what: error / bound if bound else 0.0 for what, (error, bound) in measure.WORST.items()}
        for what in sorted(ratios, key=ratios.__getitem__, reverse=True):
            error, bound = measure.WORST[what]
            terminalreporter.write_line(f"{ratios[what]:5.0%}: {error:.2e} of {bound:.0e}  {what}")
