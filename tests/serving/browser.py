"""A headless Chromium for tests of the page, through selenium and Debian's chromedriver."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
SILENCE = 60  # seconds after which a driver that does not answer is an error
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


def obstacle() -> str | None:
    """Why no browser can be started; None if one can."""
    if _browser() is None:
        return "needs Chromium: apt-get install chromium chromium-driver"
    if shutil.which("chromedriver") is None:
        return "needs chromedriver: apt-get install chromium-driver"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return 'needs selenium: pip install "monoblock[test]"'
    return None


def _browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Any]:
    """A driver with a profile of its own, which is removed at the end. The page's log is kept."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    # No proxy between the driver and its own process.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = _browser() or ""
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        driver.command_executor.client_config.timeout = SILENCE
        try:
            yield driver
        finally:
            driver.quit()


def resize(driver: Any, width: int, height: int, *, phone: bool = False, scale: float = 1) -> None:
    """Set the size of the viewport in CSS pixels."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})


def prefer(driver: Any, scheme: str) -> None:
    """Set the system's theme, "light" or "dark"."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
