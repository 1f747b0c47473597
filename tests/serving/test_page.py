"""The page in headless Chromium: a scripted server answers, and the page is used as a person does."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import browser
import pytest
from stand_in import HEADS, LAYERS, StandIn

OBSTACLE = browser.obstacle()
# `make test-page` sets the variable, and fails where there is no browser.
pytestmark = pytest.mark.skipif(
    OBSTACLE is not None and "MONOBLOCK_TEST_BROWSER" not in os.environ, reason=OBSTACLE or ""
)

PATIENCE = 60.0  # seconds until a condition must hold


class Page:
    """The page in the browser, with the actions of its tests."""

    def __init__(self, driver: Any, server: StandIn) -> None:
        self.driver, self.server = driver, server

    def open(self) -> Page:
        """The page without anything stored: the system may give a port, and so an origin, out again."""
        self.driver.get(self.server.url)
        self.script("localStorage.clear(); sessionStorage.clear()")
        self.driver.refresh()
        if not self.server.key:
            self.until(lambda: self.one("#model").is_enabled())
        return self

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def script(self, text: str, *arguments: Any) -> Any:
        return self.driver.execute_script(text, *arguments)

    def until(self, condition: Callable[[], Any]) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException

        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                if found := condition():
                    return found
            except StaleElementReferenceException:
                pass
            assert time.monotonic() < deadline, f"not within {PATIENCE} s; the page: {self.text('body')}"
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        return self.script("return document.querySelector(arguments[0]).innerText", selector)

    def messages(self) -> list[str]:
        """The texts of the messages that are shown."""
        return self.script(
            "return [...document.querySelectorAll('#messages .body')].map((body) => body.innerText.trim())"
        )

    def idle(self) -> bool:
        return self.script("return document.getElementById('stop').hidden")

    def send(self, text: str) -> None:
        """Send a message, and wait for the reply."""
        self.start(text)
        self.until(self.idle)

    def start(self, text: str) -> None:
        self.one("#prompt").send_keys(text)
        self.one("#send").click()

    def tool(self, name: str, message: int = -1) -> None:
        """Click a tool of a message."""
        items = self.all("#messages > li")
        items[message].find_element("css selector", f"[data-tool={name}]").click()

    def keys(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def chord(self, modifier: str, key: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).key_down(modifier).send_keys(key).key_up(modifier).perform()

    def focused(self) -> str:
        return self.script("return document.activeElement.id || document.activeElement.dataset.tool || ''")

    def settings(self) -> dict[str, Any]:
        return json.loads(self.script("return localStorage.getItem('monoblock.settings')") or "{}")

    def fill(self, selector: str, text: str) -> None:
        field = self.one(selector)
        field.clear()
        field.send_keys(text)


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    assert OBSTACLE is None, OBSTACLE
    with browser.chromium() as driver:
        yield driver


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as server:
        yield server


@pytest.fixture
def page(driver: Any, server: StandIn) -> Iterator[Page]:
    """The open page. Each test has an origin of its own, the port, and so a storage of its own."""
    browser.resize(driver, 1000, 800)
    browser.prefer(driver, "light")
    driver.get_log("browser")  # of the test before
    page = Page(driver, server).open()
    yield page
    problems = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    # Answers with an error status are logged by the browser itself.
    assert [text for text in problems if "Failed to load resource" not in text] == []


def test_a_reply_streams_with_its_counts(page: Page) -> None:
    page.server.pause = 0.05
    page.server.replies["count"] = "one two three four five six seven eight nine ten eleven twelve"
    page.start("count")
    seen = page.until(
        lambda: page.messages()[1:] and len(page.messages()[1].split()) >= 2 and page.messages()[1]
    )
    assert len(seen.split()) < 12, "the text comes while it is generated"
    assert not page.idle()
    assert page.one("#messages .assistant").get_attribute("aria-busy") == "true"
    page.until(page.idle)
    assert page.messages() == ["count", page.server.replies["count"]]
    meta = page.text("#messages .assistant .meta")
    assert "12 tokens" in meta and "tokens/s" in meta
    assert page.text("#context") == "19 of 2,048 tokens"
    [body] = page.server.bodies("/v1/chat/completions")
    assert body["messages"] == [{"role": "user", "content": "count"}]
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
    assert body.keys() == {"model", "messages", "stream", "stream_options"}, "an empty setting is not sent"
    assert body["model"] == "chatty"


def test_the_next_message_has_the_whole_conversation(page: Page) -> None:
    page.send("first")
    page.send("second")
    assert [m["content"] for m in page.server.requests[-1][1]["messages"]] == ["first", "re: first", "second"]
    page.driver.refresh()
    page.until(lambda: page.messages() == ["first", "re: first", "second", "re: second"])
    page.one("#new").click()
    assert page.messages() == []


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_request(page: Page, how: str) -> None:
    page.server.pause = 0.05
    page.server.replies["long"] = "word " * 1000
    page.start("long")
    page.until(lambda: len(page.messages()) == 2 and page.messages()[1])
    if how == "button":
        page.one("#stop").click()
    else:
        page.keys("\ue00c")
    page.until(page.idle)
    assert page.server.disconnected.wait(PATIENCE), "the server notices"
    kept = page.messages()[1]
    assert kept.startswith("word") and len(kept.split()) < 1000
    assert "stopped" in page.text("#messages .assistant .meta")
    assert page.focused() == "prompt"
    page.server.pause = 0
    page.send("next")
    assert page.messages()[-1] == "re: next"


def test_an_edited_message_is_answered_again_and_the_old_version_is_kept(page: Page) -> None:
    page.send("first")
    page.send("second")
    page.tool("edit", 0)
    field = page.one(".edit textarea")
    assert field.get_attribute("value") == "first"
    field.clear()
    field.send_keys("changed")
    page.one(".edit .primary").click()
    page.until(page.idle)
    assert page.messages() == ["changed", "re: changed"]
    assert page.server.requests[-1][1]["messages"] == [{"role": "user", "content": "changed"}]
    assert page.text("#messages .user .versions") == "2/2"
    page.tool("left", 0)
    assert page.messages() == ["first", "re: first", "second", "re: second"]
    page.tool("right", 0)
    assert page.messages() == ["changed", "re: changed"]


def test_an_edited_reply_is_what_the_model_reads(page: Page) -> None:
    page.send("first")
    page.tool("edit", 1)
    page.fill(".edit textarea", "another reply")
    page.one(".edit .primary").click()
    assert page.messages() == ["first", "another reply"]
    page.send("second")
    assert [m["content"] for m in page.server.requests[-1][1]["messages"]] == [
        "first",
        "another reply",
        "second",
    ]


def test_an_edit_can_be_left(page: Page) -> None:
    page.send("first")
    for leave in (lambda: page.one(".edit .plain").click(), lambda: page.keys("\ue00c")):
        page.tool("edit", 0)
        page.fill(".edit textarea", "changed")
        leave()
        assert page.messages() == ["first", "re: first"]
        assert page.focused() == "edit"
    assert len(page.server.requests) == 1


def test_retry_gives_a_new_version(page: Page) -> None:
    page.send("first")
    page.server.replies["first"] = "better"
    page.tool("retry", 1)
    page.until(page.idle)
    assert page.messages() == ["first", "better"]
    assert page.server.requests[-1][1]["messages"] == [{"role": "user", "content": "first"}]
    assert page.text("#messages .assistant .versions") == "2/2"
    page.server.replies["first"] = "best"
    page.tool("retry", 0)
    page.until(page.idle)
    assert page.messages() == ["first", "best"]
    page.tool("left", 1)
    page.tool("left", 1)
    assert page.messages() == ["first", "re: first"]


def test_settings_are_sent_and_kept(page: Page) -> None:
    page.one("#open-settings").click()
    page.fill("#system", "Be brief.")
    page.fill("#parameter-temperature", "0.3")
    page.fill("#parameter-top_p", "0.9")
    page.fill("#parameter-max_tokens", "40")
    page.fill("#parameter-seed", "7")
    page.fill("#stop-strings", "END\n\\n\\n")
    page.one("#settings .bar button").click()
    page.driver.refresh()
    page.until(lambda: page.one("#model").is_enabled())
    page.send("first")
    body = page.server.requests[-1][1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    found = {name: body[name] for name in ("temperature", "top_p", "max_tokens", "seed", "stop")}
    assert found == {"temperature": 0.3, "top_p": 0.9, "max_tokens": 40, "seed": 7, "stop": ["END", "\n\n"]}
    assert page.one("#parameter-seed").get_attribute("value") == "7"
    page.one("#open-settings").click()
    page.one("#reset").click()
    assert page.one("#parameter-seed").get_attribute("value") == ""
    page.one("#settings .bar button").click()
    page.send("second")
    body = page.server.requests[-1][1]
    assert not body.keys() & {"seed", "max_tokens"} and body["messages"][0]["role"] == "user"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", "3", "Temperature must be a number from 0 to 2."),
        ("top_p", "much", "Top p must be a number from 0 to 1."),
        ("max_tokens", "1.5", "Max tokens must be an integer from 1 to 1,000,000."),
        ("seed", "-1", "Seed must be an integer from 0 to"),
    ],
)
def test_wrong_settings_are_refused_in_words(page: Page, field: str, value: str, words: str) -> None:
    page.one("#open-settings").click()
    page.fill(f"#parameter-{field}", value)
    assert page.text(f"#parameter-{field}-error").startswith(words)
    assert page.one(f"#parameter-{field}").get_attribute("aria-invalid") == "true"
    page.one("#settings .bar button").click()
    assert page.script("return document.getElementById('settings').open"), "it stays open at a wrong value"
    assert page.focused() == f"parameter-{field}"
    page.keys("\ue00c")
    page.send("first")
    assert page.server.requests[-1][1].get(field) != value
    assert str(page.settings().get("parameters", {}).get(field)) != value


def test_damaged_storage_gives_the_defaults(page: Page) -> None:
    for content in (
        "{",
        '{"parameters": {"temperature": 99, "seed": "x"}, "theme": 3, "stop": [1]}',
        "[]",
        "null",
    ):
        page.script("localStorage.setItem('monoblock.settings', arguments[0])", content)
        page.script("sessionStorage.setItem('monoblock.conversation', arguments[0])", content)
        page.driver.refresh()
        page.until(lambda: page.one("#model").is_enabled())
        page.one("#new").click()
        page.send("first")
        body = page.server.requests[-1][1]
        assert body["messages"] == [{"role": "user", "content": "first"}]
        assert not body.keys() & {"temperature", "seed", "stop"}


def brightness(page: Page) -> float:
    """Of the page's background: the mean of red, green and blue, 0 to 255."""
    colour = page.script("return getComputedStyle(document.body).backgroundColor")
    return sum(map(float, colour.partition("(")[2].rstrip(")").split(",")[:3])) / 3


def test_the_theme_follows_the_system_and_the_switch(page: Page) -> None:
    assert brightness(page) > 200
    browser.prefer(page.driver, "dark")
    page.until(lambda: brightness(page) < 60)
    page.one("#theme").click()
    assert brightness(page) > 200
    page.driver.refresh()
    assert brightness(page) > 200, "the choice is kept"
    page.one("#theme").click()
    assert brightness(page) < 60
    browser.prefer(page.driver, "light")
    assert brightness(page) < 60
    page.one("#open-settings").click()
    page.one("#theme-choice option[value=system]").click()
    assert brightness(page) > 200


def test_everything_works_with_the_keyboard_alone(page: Page) -> None:
    enter, tab, escape, control, space = "\ue007", "\ue004", "\ue00c", "\ue009", " "
    assert page.focused() == "prompt", "the message field has the focus at the start"
    page.keys("first", enter)
    page.until(lambda: page.messages() == ["first", "re: first"] and page.idle())
    page.keys("a")
    page.chord("\ue008", enter)  # Shift+Enter begins a line
    page.keys("b")
    page.chord(control, enter)
    page.until(lambda: page.messages()[2:] == ["a\nb", "re: a\nb"] and page.idle())
    # Backwards from the field: the tools of the last reply.
    order: list[str] = []
    for _ in range(4):
        page.chord("\ue008", tab)
        order.append(page.focused())
    assert order == ["attention", "retry", "edit", "copy"]
    page.keys(tab, enter)
    assert page.script("return document.activeElement.matches('.edit textarea')")
    page.keys(" more")
    page.chord(control, enter)
    assert page.messages()[-1] == "re: a\nb more"
    page.script("document.getElementById('open-settings').focus()")
    page.keys(enter)
    assert page.script("return document.getElementById('settings').open")
    page.keys(escape)
    assert not page.script("return document.getElementById('settings').open")
    assert page.focused() == "open-settings", "the focus returns"
    page.script("document.getElementById('theme').focus()")
    page.keys(space)
    assert page.settings()["theme"] == "dark"


def test_every_control_has_a_name_and_is_reached_by_tab(page: Page) -> None:
    page.send("first")
    unnamed = page.script(
        """
        const name = (e) => e.getAttribute("aria-label") || e.labels?.[0]?.textContent || e.textContent || "";
        return [...document.querySelectorAll("button, input, select, textarea, a, dialog")]
          .filter((e) => !name(e).trim() && !e.getAttribute("aria-labelledby")).map((e) => e.outerHTML);
        """
    )
    assert unnamed == []
    hidden = page.script(
        """
        return [...document.querySelectorAll("header :is(button, select), main button, footer :is(button, textarea)")]
          .filter((e) => e.tabIndex < 0 && e.offsetParent).map((e) => e.outerHTML);
        """
    )
    assert hidden == []


def test_screen_readers_hear_the_reply(page: Page) -> None:
    page.server.replies["first"] = "One sentence. And **another** one"
    page.send("first")
    spoken = page.script("return document.getElementById('spoken').textContent.replace(/\\s+/g, ' ')")
    assert spoken == "One sentence.And another one"
    assert page.script("return document.getElementById('status').textContent") == "Reply complete. 5 tokens"
    assert page.one("#spoken").get_attribute("aria-live") == "polite"


@pytest.mark.parametrize(("width", "height"), [(320, 568), (390, 844), (844, 390)])
def test_a_phone_needs_no_horizontal_scrolling(page: Page, width: int, height: int) -> None:
    code = "```\n" + "x" * 400 + "\n```"
    table = "| " + " | ".join(f"column{i}" for i in range(20)) + " |\n|" + "---|" * 20 + "\n|" + " 1 |" * 20
    page.server.replies["wide"] = f"{'w' * 300}\n\n{code}\n\n{table}\n\n# {'h' * 200}\n\n- `{'c' * 200}`"
    browser.resize(page.driver, width, height, phone=True)
    page.send("wide")
    page.send("y" * 300)

    def fits(selector: str) -> bool:
        return page.script(
            "const e = document.querySelector(arguments[0]); return e.scrollWidth <= e.clientWidth", selector
        )

    def inside() -> list[str]:
        return page.script(
            """
            return [...document.querySelectorAll("header *, #composer *, #messages > li > *, dialog[open] *")]
              .filter((e) => !e.closest(".hidden, .code, .table, symbol") && e.checkVisibility())
              .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < -1)
              .map((e) => e.outerHTML.slice(0, 100));
            """
        )

    assert fits("html") and fits("#scroll")
    assert inside() == []
    for opener, closer in (
        ("#open-settings", "#settings .bar button"),
        ("[data-tool=attention]", "#attention-close"),
    ):
        page.script("document.querySelector(arguments[0]).click()", opener)
        page.until(lambda: page.all("dialog[open]"))
        assert fits("dialog[open]")
        assert inside() == []
        page.one(closer).click()
    small = page.script(
        """
        return [...document.querySelectorAll("header button, .tool, #send")]
          .filter((e) => e.offsetParent && e.getBoundingClientRect().height < 40).map((e) => e.outerHTML);
        """
    )
    assert small == [], "a finger needs 40 pixels"


HOSTILE = """<script>window.broken = 1</script> <img src=x onerror="window.broken = 1">

[click](javascript:window.broken=1) [data](data:text/html,<script>window.broken=1</script>) [ok](https://example.org/a_b?c=1&d)
[vb](vbscript:x) [j](  java\nscript:window.broken=1) [t](JaVaScRiPt:window.broken=1 "x") <javascript:window.broken=1>
![image](https://example.org/x.png) [nested [one](javascript:window.broken=1)](javascript:window.broken=1)
[e](&#106;avascript:window.broken=1) [c](\x01javascript:window.broken=1) [/](//example.org) [mail](mailto:a@example.org)

<a href="javascript:window.broken=1">html</a> `<b>code</b>` <style>body { display: none }</style>

| <script>window.broken = 1</script> | <svg onload=window.broken=1> |
|---|---|
| <iframe srcdoc="<script>parent.broken=1</script>"> | [x](javascript:window.broken=1) |

```html"><script>window.broken = 1</script>
</code></pre><script>window.broken = 1</script>
```
"""


def test_hostile_markdown_does_nothing(page: Page) -> None:
    page.server.replies["attack"] = HOSTILE
    page.send("attack")
    made = page.script(
        "return [...new Set([...document.querySelectorAll('#messages .body *')].map((e) => e.localName))].sort()"
    )
    assert set(made) <= {"p", "br", "a", "span", "code", "div", "pre", "button",
                         "table", "thead", "tbody", "tr", "th", "td"}  # fmt: skip
    links = page.script("return [...document.querySelectorAll('#messages .body a')].map((a) => a.href)")
    assert links == ["https://example.org/a_b?c=1&d", "https://example.org/x.png", "mailto:a@example.org"]
    assert page.script(
        "return [...document.querySelectorAll('#messages .body a')].every((a) => a.rel.includes('noopener'))"
    )
    assert "<script>window.broken = 1</script>" in page.messages()[1], "it is shown as text"
    attributes = page.script(
        "return [...document.querySelectorAll('#messages .body *')].flatMap((e) => e.getAttributeNames())"
    )
    assert not [name for name in attributes if name.startswith("on")]
    assert page.script("return window.broken") is None


def test_the_security_policy_forbids_inline_scripts(page: Page) -> None:
    page.script(
        """
        const script = document.createElement("script");
        script.textContent = "window.inline = 1";
        document.body.append(script);
        """
    )
    assert page.script("return window.inline") is None
    messages = [entry["message"] for entry in page.driver.get_log("browser")]
    assert any("Content Security Policy" in text for text in messages)


MARKDOWN = """# Title

Some *italic*, **bold**, ***both***, ~~old~~, `code *x*` and snake_case_name and 2 * 3 * 4.
Next line with \\*escapes\\* and https://example.org/path_(a).

1. one
   - inner **a**
   - inner b
2. two

   paragraph

> quoted
> > twice

| a | b |
|:--|--:|
| 1 | `x\\|y` |

---

```python
def f():
    return "<b>"
"""


def test_markdown_becomes_elements(page: Page) -> None:
    page.server.replies["markdown"] = MARKDOWN
    page.send("markdown")
    html = page.script(
        """
        const copy = document.querySelector("#messages .assistant .body").cloneNode(true);
        copy.querySelectorAll(".code-bar").forEach((e) => e.remove());
        for (const e of copy.querySelectorAll("*"))
          for (const name of e.getAttributeNames())
            if (!["href", "scope", "style"].includes(name)) e.removeAttribute(name);
        return copy.innerHTML;
        """
    )
    assert html == (
        "<h3>Title</h3>"
        "<p>Some <em>italic</em>, <strong>bold</strong>, <em><strong>both</strong></em>, <del>old</del>, "
        "<code>code *x*</code> and snake_case_name and 2 * 3 * 4.<br>"
        'Next line with *escapes* and <a href="https://example.org/path_(a)">https://example.org/path_(a)</a>.</p>'
        "<ol><li><p>one</p><ul><li>inner <strong>a</strong></li><li>inner b</li></ul></li>"
        "<li><p>two</p><p>paragraph</p></li></ol>"
        "<blockquote><p>quoted</p><blockquote><p>twice</p></blockquote></blockquote>"
        '<div><table><thead><tr><th scope="col" style="text-align: start;">a</th>'
        '<th scope="col" style="text-align: end;">b</th></tr></thead>'
        '<tbody><tr><td style="text-align: start;">1</td>'
        '<td style="text-align: end;"><code>x|y</code></td></tr></tbody></table></div>'
        "<hr>"
        "<div><pre><code><span>def</span> <span>f</span>():\n"
        '    <span>return</span> <span>"&lt;b&gt;"</span>\n</code></pre></div>'
    )


def test_streaming_gives_the_same_elements_as_the_whole_text(page: Page) -> None:
    same = page.script(
        """
        return import("/page/markdown.js").then(({ render }) => {
          const streamed = document.createElement("div");
          for (let end = 1; end <= arguments[0].length; end++) render(streamed, arguments[0].slice(0, end));
          const whole = document.createElement("div");
          render(whole, arguments[0]);
          return streamed.innerHTML === whole.innerHTML;
        });
        """,
        MARKDOWN,
    )
    assert same is True


@pytest.mark.parametrize(
    "text",
    ["[" * 20000, "*a " * 10000, "> " * 5000 + "x", "- " * 5000 + "x", "`" * 9999 + " `` " * 3000,
     "**a _b " * 5000, "|a" * 5000 + "\n" + "|-" * 5000, "![](" * 5000, "<http://" * 5000, "~~" * 9999,
     "```js\n" + "\\'" * 20000, "```js\n" + "`\\" * 20000, "```python\n" + '"' * 40001],
    ids=["brackets", "stars", "quotes", "items", "backticks", "mixed", "table", "images", "angles", "tildes",
         "apostrophes in code", "backticks in code", "quotes in code"],
)  # fmt: skip
def test_pathological_markdown_is_bounded(page: Page, text: str) -> None:
    """No stack overflow and no quadratic time; the driver's own limit for a script is 30 s."""
    page.driver.set_script_timeout(30)
    shown = page.script(
        """
        return import("/page/markdown.js").then(({ render }) => {
          const box = document.createElement("div");
          render(box, arguments[0]);
          return box.childNodes.length > 0;
        });
        """,
        text,
    )
    assert shown is True


def test_errors_are_shown_in_words_and_can_be_tried_again(page: Page) -> None:
    page.server.errors["busy"] = (429, "1024 requests wait", {"Retry-After": "3"})
    page.send("busy")
    assert "too many requests: 1024 requests wait. Try again in 3 seconds." in page.text("#alert")
    assert page.messages() == ["busy"], "the message is kept, without an empty reply"
    del page.server.errors["busy"]
    page.one("#alert button").click()
    page.until(lambda: page.messages() == ["busy", "re: busy"])
    assert page.text("#alert") == ""
    page.server.errors["bad"] = (400, "temperature must be from 0 to 2, got 3", {})
    page.send("bad")
    assert "The server refused the request: temperature must be from 0 to 2, got 3." in page.text("#alert")
    page.one("#new").click()
    page.server.errors["crash"] = (500, "", {})
    page.send("crash")
    assert "The server failed." in page.text("#alert")


@pytest.mark.parametrize(
    ("how", "words"),
    [("cut", "The server ended the reply before it was complete."), ("error", "the model failed")],
)
def test_a_broken_stream_keeps_its_text(page: Page, how: str, words: str) -> None:
    page.server.replies["break"] = "one two three four"
    page.server.broken["break"] = how
    page.send("break")
    assert page.messages() == ["break", "one two"]
    assert words in page.text("#alert")
    assert "incomplete" in page.text("#messages .assistant .meta")


def test_a_server_that_is_gone_is_reported(page: Page) -> None:
    page.server.__exit__()
    page.send("anyone?")
    assert page.text("#alert").startswith("The server cannot be reached.")


def test_a_key_is_asked_for_and_sent(driver: Any, server: StandIn) -> None:
    server.key = "secret"
    page = Page(driver, server).open()
    page.until(lambda: page.one("#key").is_displayed())
    page.one("#key-value").send_keys("wrong")
    page.one("#key .primary").click()
    page.until(
        lambda: (
            page.one("#key").is_displayed()
            and page.text("#key-text") == "The server did not accept this key."
        )
    )
    page.one("#key-value").send_keys("secret")
    page.one("#key .primary").click()
    page.until(lambda: page.one("#model").is_enabled())
    page.keys("first", "\ue007")
    page.until(lambda: page.messages() == ["first", "re: first"] and page.idle())
    server.key = "changed"
    page.start("second")
    page.until(lambda: page.one("#key").is_displayed())
    page.one("#key-value").send_keys("changed")
    page.one("#key .primary").click()
    page.until(lambda: page.messages()[3:] == ["re: second"])
    assert page.script("return JSON.stringify({...localStorage})").find("changed") < 0, (
        "not kept beyond the tab"
    )


def test_a_model_without_a_template_continues_text(page: Page) -> None:
    page.one("#model option[value=plain]").click()
    page.start("Once upon a time")
    page.until(lambda: page.idle() and len(page.messages()) == 2)
    path, body = page.server.requests[-1]
    assert (path, body["prompt"], body["model"]) == ("/v1/completions", "Once upon a time", "plain")
    assert body["max_tokens"] == 128
    assert page.messages() == ["Once upon a time", "and so on"]
    page.one("#send").click()  # an empty field continues the text
    page.until(lambda: page.idle() and len(page.messages()) == 3)
    assert page.server.requests[-1][1]["prompt"] == "Once upon a time and so on"
    page.send(", he said")
    assert page.server.requests[-1][1]["prompt"] == "Once upon a time and so on and so on, he said"
    page.driver.refresh()
    page.until(lambda: page.one("#model").is_enabled())
    assert page.one("#model").get_attribute("value") == "plain", "the model is kept"
    assert [option.text for option in page.all("#model option")] == ["chatty", "plain"]


def test_a_model_is_found_to_have_no_template(page: Page) -> None:
    """The list of models cannot tell before a model is loaded."""
    page.server.untold = True
    page.driver.refresh()
    page.until(lambda: page.one("#model").is_enabled())
    page.one("#model option[value=plain]").click()
    page.start("Once upon a time")
    page.until(lambda: page.messages() == ["Once upon a time", "and so on"] and page.idle())
    assert [path for path, _ in page.server.requests] == ["/v1/chat/completions", "/v1/completions"]
    assert page.text("#alert") == ""
    assert page.one("#prompt").get_attribute("placeholder") == "Write the beginning of a text"


def test_a_text_does_not_ask_for_more_than_the_context(page: Page) -> None:
    page.one("#model option[value=plain]").click()
    page.send("x " * 490)
    assert page.server.requests[-1][1]["max_tokens"] == 1024 - 980 - 1


def test_a_reply_is_continued(page: Page) -> None:
    page.server.broken["first"] = "cut"
    page.server.replies["first"] = "one two three four"
    page.send("first")
    assert page.messages() == ["first", "one two"]
    page.server.replies["one two "] = "three four"
    page.tool("continue")
    page.until(page.idle)
    assert page.messages() == ["first", "one two three four"]
    body = page.server.requests[-1][1]
    assert [m["role"] for m in body["messages"]] == ["user", "assistant"]
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert page.text("#messages .assistant .versions") == "2/2"
    assert not page.all("[data-tool=continue]"), "it is complete"
    page.tool("left")
    assert page.messages() == ["first", "one two"]


def test_the_attention_view_shows_weights(page: Page) -> None:
    page.server.replies["one two three"] = "four five six"
    page.send("one two three")
    page.tool("attention")
    page.until(lambda: len(page.all(".token")) == 5)
    body = page.server.bodies("/attention")[-1]
    assert [m["content"] for m in body["messages"]] == ["one two three", "four five six"]
    assert (body["layer"], body["head"]) == ("mean", "mean")
    assert len(page.all("#attention-layer option")) == LAYERS + 1
    assert len(page.all("#attention-head option")) == HEADS + 1
    shares = page.script(
        "return [...document.querySelectorAll('.token')].map((e) => e.style.getPropertyValue('--share'))"
    )
    assert max(map(float, shares[1:])) == 1 and shares[0] == "0.000", "scaled without the first token"
    page.one("#attention-first").click()
    shares = page.script(
        "return [...document.querySelectorAll('.token')].map((e) => e.style.getPropertyValue('--share'))"
    )
    assert shares[0] == "1.000"
    page.one("#attention-layer option[value='2']").click()
    page.one("#attention-head option[value='1']").click()
    page.until(lambda: page.server.bodies("/attention")[-1]["head"] == 1)
    assert page.server.bodies("/attention")[-1]["layer"] == 2
    page.until(lambda: page.one("#attention-tokens").get_attribute("aria-busy") == "false")
    page.one(".token[data-index='1']").click()
    page.until(lambda: len(page.all(".token.later")) == 3)
    assert page.server.bodies("/attention")[-1]["position"] == 1
    page.keys("\ue014", "\ue007")  # the next token, with the keyboard
    page.until(lambda: len(page.all(".token.later")) == 2)
    assert page.script("return document.activeElement.dataset.index") == "2"
    page.one("#attention summary").click()
    rows = page.script("return [...document.querySelectorAll('#attention-table tbody tr')].length")
    assert rows == 3
    page.keys("\ue00c")
    assert page.focused() == "attention"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The real server with the embedded demo, and with a model without a chat template."""
    live_server = pytest.importorskip("live_server", reason="needs the extras serve and torch")
    import server_models

    from monoblock import AutoTokenizer, demo

    folder = server_models.tools_model(tmp_path_factory.mktemp("models") / "plain")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert demo.path().is_dir()
    with live_server.live(None, folder, names=["demo", "plain"], api_key="secret") as server:
        yield server


def test_the_real_server(driver: Any, real: Any) -> None:
    page = Page(driver, StandIn())
    page.server.key = "secret"
    driver.get(real.url + "/")
    page.until(lambda: page.one("#key").is_displayed())
    page.one("#key-value").send_keys("secret")
    page.one("#key .primary").click()
    page.until(lambda: page.one("#model").is_enabled())
    page.one("#open-settings").click()
    page.fill("#parameter-temperature", "0")
    page.fill("#parameter-max_tokens", "12")
    page.one("#settings .bar button").click()
    page.send("Write a function.")
    assert page.text("#alert") == ""
    asked = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Write a function."}],
        "temperature": 0,
    }
    whole = real.http.post(
        "/v1/chat/completions", json={**asked, "max_tokens": 12}, headers={"Authorization": "Bearer secret"}
    )
    content = whole.json()["choices"][0]["message"]["content"]
    shown = page.script("return document.querySelector('#messages .assistant').node.content")
    assert shown == content and content
    assert "12 tokens" in page.text("#messages .assistant .meta")
    page.tool("continue")
    page.until(page.idle)
    assert page.text("#alert") == ""
    longer = page.script("return document.querySelector('#messages .assistant').node.content")
    assert longer.startswith(content) and len(longer) > len(content)
    page.tool("attention")
    page.until(lambda: page.all(".token"))
    assert len(page.all("#attention-layer option")) == 5
    page.one("#attention-close").click()
    page.one("#open-settings").click()
    page.fill("#parameter-max_tokens", "5000")
    page.keys("\ue00c")
    page.send("More.")
    assert "context has 1,024 tokens" in page.text("#alert")
    page.one("#open-settings").click()
    page.one("#reset").click()
    page.keys("\ue00c")
    page.one("#new").click()
    page.one("#model option[value=plain]").click()
    page.start("name")
    page.until(lambda: len(page.messages()) == 2 and page.idle())
    assert page.text("#alert") == ""
    assert page.one("#prompt").get_attribute("placeholder") == "Write the beginning of a text"
    assert (
        page.script("return document.querySelector('#messages .assistant').node.usage.completion_tokens") > 0
    )


def test_stop_cancels_in_the_real_server(driver: Any, real: Any) -> None:
    page = Page(driver, StandIn())
    page.server.key = "secret"
    driver.get(real.url + "/")
    page.until(lambda: page.one("#model").is_enabled())
    page.one("#model option[value=plain]").click()
    page.one("#new").click()
    page.one("#open-settings").click()
    page.fill("#parameter-temperature", "0")  # random weights repeat themselves, without an end
    page.fill("#parameter-max_tokens", "1900")
    page.one("#settings .bar button").click()
    page.start("name")
    page.until(lambda: len(page.messages()) == 2 and page.messages()[1])
    page.one("#stop").click()
    page.until(page.idle)
    assert page.script("return document.querySelector('#messages .assistant').node.finish") == "stopped"
    entry = real.app.state.registry.entries["plain"]
    page.until(lambda: entry.loaded.engine.stats().running == 0)
    assert entry.users == 0
