"""What all tests share: no framework is imported here, so that the core's tests run without any."""

from __future__ import annotations

import logging

import pytest

from monoblock.config import PretrainedConfig


@pytest.fixture(autouse=True)
def _fresh_warnings():
    """Unknown fields are warned about once in a process; each test counts anew."""
    PretrainedConfig._warned.clear()


@pytest.fixture
def logs(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What monoblock logs from INFO on; `logs.messages` are the texts."""
    caplog.set_level(logging.INFO, logger="monoblock")
    return caplog


def pytest_terminal_summary(terminalreporter) -> None:
    """With -v: the largest differences that the comparisons measured."""
    if terminalreporter.config.get_verbosity() < 1:
        return
    import measure

    if measure.WORST:
        terminalreporter.section("largest differences")
        for what, (error, bound) in sorted(measure.WORST.items(), key=lambda item: -item[1][0]):
            terminalreporter.write_line(f"{error:9.2e} of {bound:.0e}  {what}")
