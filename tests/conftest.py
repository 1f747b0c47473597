"""What all tests share: no framework is imported here, so that the core's tests run without any."""

from __future__ import annotations

import logging
import signal

import pytest

from monoblock import native
from monoblock.config import PretrainedConfig
from monoblock.native import build

# A shell's background job ignores Ctrl-C, and so would the commands that tests start, and stop with it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _fresh_warnings():
    """Unknown fields are warned about once in a process; each test counts anew."""
    PretrainedConfig._warned.clear()


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


def pytest_terminal_summary(terminalreporter) -> None:
    """With -v: the largest differences that the comparisons measured."""
    if terminalreporter.config.get_verbosity() < 1:
        return
    import measure

    if measure.WORST:
        terminalreporter.section("largest differences")
        for what, (error, bound) in sorted(measure.WORST.items(), key=lambda item: -item[1][0]):
            terminalreporter.write_line(f"{error:9.2e} of {bound:.0e}  {what}")
