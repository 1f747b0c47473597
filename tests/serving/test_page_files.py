"""The page's files: complete, of one origin, and without anything that its security policy forbids."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
from live_server import LiveServer, live

from monoblock.serving.page import INDEX, NAMES, SECURITY, page_file

ALL = (INDEX, *NAMES)


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def text(name: str) -> str:
    return page_file(name).content.decode()


def test_every_linked_file_exists_and_every_file_is_used() -> None:
    linked = {value for name in ALL for value in re.findall(r"[\"'(](?:\./|page/)([\w.]+)[\"')]", text(name))}
    assert linked == set(NAMES)


def test_nothing_is_inline_and_nothing_is_of_another_origin() -> None:
    for tag, attributes in Elements(text(INDEX)).found:
        assert tag != "style" and "style" not in attributes
        assert tag != "script" or attributes["src"]
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert re.fullmatch(r"page/[\w.]+|#[\w-]+", attributes.get(name) or "#x")
    for name in ALL:
        urls = re.findall(r"https?://[\w.-]+", text(name))
        assert set(urls) <= {"http://www.w3.org"}, "namespaces of SVG only"
    for name in NAMES:
        code = re.sub(r"//.*|/\*.*?\*/", "", text(name)) if name.endswith(".js") else ""
        assert not re.search(
            r"\.innerHTML|\.outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", code
        )


def test_labels_and_descriptions_refer_to_elements() -> None:
    elements = Elements(text(INDEX)).found
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in elements:
        for name in ("for", "aria-describedby", "aria-labelledby"):
            if name in attributes:
                assert attributes[name] in ids
    used = {value for name in NAMES for value in re.findall(r'(?<!\.)\bget\("([\w-]+)"\)', text(name))}
    assert used <= set(ids)


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live(None, api_key="secret") as server:
        yield server


@pytest.mark.parametrize("name", ALL)
def test_files_are_served_without_a_key_and_with_the_policy(server: LiveServer, name: str) -> None:
    answer = server.http.get("/" if name == INDEX else f"/page/{name}")
    assert answer.status_code == 200 and answer.content == page_file(name).content
    assert answer.headers["content-type"] == page_file(name).type
    assert answer.headers["content-security-policy"] == SECURITY["Content-Security-Policy"]
    assert "'unsafe" not in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    "path", ["/page/__init__.py", "/page/..%2Fllm.py", "/page/none.js", "/page/", "/page/%00"]
)
def test_other_files_are_not_served(server: LiveServer, path: str) -> None:
    answer = server.http.get(path, headers={"Authorization": "Bearer secret"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"
