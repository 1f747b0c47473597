"""What all tests share: no framework is imported here, so that the core's tests run without any."""

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
# A shell's background job ignores Ctrl-C, and so would the commands that tests start, and stop with it.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Bytes that a process of tests may hold at its peak, so that the suite runs beside other work on 8 GB.
MOST_MEMORY = 4 << 30


def free_memory() -> None:
    """Drop what frameworks keep of compiled programs and graphs, and give the pages back to the system."""
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
    if keras := sys.modules.get("keras"):
        keras.backend.clear_session()
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
    gc.collect()
    gc.freeze()  # what is left are modules and caches, which the next collection need not walk through
    if sys.platform == "linux":  # glibc keeps freed pages for later; other C libraries have no such function
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def pytest_configure() -> None:
    """Imports make no garbage to speak of."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Garbage is collected between tests: Python would look for it all the time (in tracing graphs of TensorFlow: an
    eighth of the time), and among what was imported, which stays."""
    gc.collect()
    gc.freeze()


def peak_memory() -> int:
    """Bytes that this process, or one that it started, held at most."""
    processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = max(resource.getrusage(which).ru_maxrss for which in processes)
    return peak if sys.platform == "darwin" else peak << 10


@pytest.fixture(autouse=True, scope="module")
def _memory_of_a_module():
    """What the tests of a file compile is not kept for the next file."""
    yield
    free_memory()


@pytest.fixture(autouse=True)
def _fresh_warnings():
    """Unknown fields are warned about once in a process; each test counts anew."""
    PretrainedConfig._warned.clear()


@pytest.fixture(autouse=True)
def _garbage():
    """What tests leave in cycles goes once there is much of it: 300,000 lists, dicts and the like."""
    yield
    gc.disable()  # some libraries switch it on
    if gc.get_count()[0] > 300_000:
        gc.collect()


@pytest.fixture
def logs(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What monoblock logs from INFO on; `logs.messages` are the texts."""
    caplog.set_level(logging.INFO, logger="monoblock")
    return caplog


@pytest.fixture(params=[*build.LEVELS, "0"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A level of the native kernels that is in use during the test; `0` is none."""
    found = native.choose(request.param)
    if request.param != "0" and found[1] != request.param:
        pytest.skip(f"native kernels: {found[2]}")
    monkeypatch.setattr(native, "_opened", lambda: found)
    return request.param


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process that held too much memory fails, whatever its tests say."""
    if peak_memory() > MOST_MEMORY and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter) -> None:
    _write_counts(terminalreporter)
    peak = peak_memory() / 2**30
    if peak_memory() > MOST_MEMORY:
        terminalreporter.write_line(
            f"FAILED: a test process held {peak:.1f} GiB, more than {MOST_MEMORY >> 30}; see free_memory()",
            red=True,
        )
    else:
        terminalreporter.write_line(f"peak memory: {peak:.1f} GiB")
    _write_differences(terminalreporter)


def _write_counts(terminalreporter) -> None:
    """For tools/run_tests.py: how many tests had which outcome."""
    if path := os.environ.get("MONOBLOCK_TEST_COUNTS"):
        stats = terminalreporter.stats
        Path(path).write_text(
            json.dumps({outcome: len(tests) for outcome, tests in stats.items() if outcome})
        )


def _write_differences(terminalreporter) -> None:
    """With -vv (`-q` is on by default): the measured differences and their bounds, those nearest to failing first."""
    if terminalreporter.config.get_verbosity() < 1:
        return
    import measure

    if measure.WORST:
        terminalreporter.section("differences nearest to their bounds")
        shares = {what: error / bound if bound else 0.0 for what, (error, bound) in measure.WORST.items()}
        for what in sorted(shares, key=shares.__getitem__, reverse=True):
            error, bound = measure.WORST[what]
            terminalreporter.write_line(f"{shares[what]:5.0%}: {error:.2e} of {bound:.0e}  {what}")
