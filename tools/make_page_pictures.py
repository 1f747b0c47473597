"""Writes docs/images/serving-*.png, screenshots of the page: `python tools/make_page_pictures.py [FOLDER]`.

Needs Chromium, chromedriver, selenium and Pillow. The conversation of the first ones is scripted; the attention is that
of the embedded demo.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "serving")]

import browser  # noqa: E402
from live_server import live  # noqa: E402
from PIL import Image  # noqa: E402
from stand_in import StandIn  # noqa: E402

FOLDER = ROOT / "docs" / "images"
WIDTH, HEIGHT = 1180, 860
CODE = "Write a function that adds two numbers."
QUESTION = "How do I read a large file line by line in Python, and what does it cost?"
ANSWER = """Iterate over the file object: it reads in **buffered blocks** and gives one line at a time.

```python
def count_words(path: str) -> int:
    with open(path, encoding="utf-8") as file:
        return sum(len(line.split()) for line in file)
```

| way | memory | when |
|---|---|---|
| `for line in file` | one line | almost always |
| `file.readlines()` | the whole file | small files |
| `mmap` | pages on demand | random access |

- A line that is longer than the memory needs `file.read(size)`.
- Pass `encoding=`, or the result depends on the machine.
"""
SECOND = "And from a compressed file?"
SECOND_ANSWER = """Open it with `gzip.open(path, "rt")`; the loop stays the same."""


def ask(driver: Any, text: str) -> None:
    """Send a message and wait for the end of the reply."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    field = driver.find_element(By.ID, "prompt")
    field.send_keys(text)
    driver.find_element(By.ID, "send").click()
    WebDriverWait(driver, 120).until(
        lambda d: (
            d.find_elements(By.CSS_SELECTOR, "#messages .assistant:last-child .meta")
            and not d.find_element(By.ID, "send").get_attribute("hidden")
        )
    )


def save(driver: Any, name: str, folder: Path) -> None:
    """The viewport as a PNG."""
    image = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    path = folder / f"serving-{name}.png"
    image.save(path, optimize=True)
    print(f"{path.name}: {image.width}x{image.height}, {path.stat().st_size // 1024} KB")


def main(folder: Path) -> None:
    """Write all pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    with browser.chromium() as driver:
        chat(driver, folder)
        attention(driver, folder)


def opened(driver: Any, url: str) -> Any:
    """The page, ready; returns a wait."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.prefer(driver, "light")
    browser.resize(driver, WIDTH, HEIGHT)
    driver.get(url)
    wait = WebDriverWait(driver, 120)
    wait.until(lambda d: d.find_element(By.ID, "model").is_enabled())
    return wait


def chat(driver: Any, folder: Path) -> None:
    """A scripted conversation: light, dark, with the settings, on a phone."""
    from selenium.webdriver.common.by import By

    with StandIn() as server:
        server.replies = {QUESTION: ANSWER, SECOND: SECOND_ANSWER}
        server.pause = 0.02
        opened(driver, server.url)
        ask(driver, QUESTION)
        ask(driver, SECOND)
        save(driver, "light", folder)
        browser.prefer(driver, "dark")
        save(driver, "dark", folder)
        browser.prefer(driver, "light")
        driver.find_element(By.ID, "open-settings").click()
        save(driver, "settings", folder)
        driver.find_element(By.CSS_SELECTOR, "#settings .bar button").click()
        browser.resize(driver, 390, 780, phone=True, scale=1.5)
        driver.execute_script(
            "document.getElementById('scroll').scrollTop = 0; document.activeElement.blur()"
        )
        save(driver, "phone", folder)


def attention(driver: Any, folder: Path) -> None:
    """The embedded demo's attention, on the real server."""
    from selenium.webdriver.common.by import By

    with live(None) as server:
        wait = opened(driver, f"{server.url}/")
        settings = {"parameters": {"temperature": 0, "max_tokens": 60}}
        driver.execute_script(
            "localStorage.setItem('monoblock.settings', arguments[0])", json.dumps(settings)
        )
        wait = opened(driver, f"{server.url}/")
        ask(driver, CODE)
        driver.find_elements(By.CSS_SELECTOR, "[data-tool=attention]")[-1].click()
        wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, ".token"))
        driver.find_element(By.CSS_SELECTOR, "#attention-layer option[value='1']").click()
        wait.until(lambda d: d.find_element(By.ID, "attention-tokens").get_attribute("aria-busy") == "false")
        driver.execute_script("document.querySelector('#attention details').open = true")
        save(driver, "attention", folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
