"""The documentation site's generated pages and its check (`make docs`), without MkDocs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

import monoblock

ROOT = Path(__file__).parents[2]


def tool(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


site, check = tool("docs_site"), tool("check_site")


def test_every_public_name_is_on_one_page_of_the_api_reference() -> None:
    described = [
        name
        for text in site.api_pages().values()
        for name in re.findall(r"^::: monoblock\.(\w+)$", text, re.MULTILINE)
    ]
    assert sorted(described) == sorted(monoblock._NAMES)
    assert set(monoblock.__all__) <= set(described)


def test_notebooks_become_pages() -> None:
    page = site.root_pages()["examples/jax_and_keras.md"]
    assert page.startswith("# The same model on JAX and Keras") and "```python\nimport" in page
    assert "```text\n" in page and "(data:image/png;base64," in page
    assert "](../training.md#" in site.root_pages()["examples/embeddings_and_search.md"]


def test_every_page_is_in_the_navigation() -> None:
    pages = {*site.api_pages(), *site.root_pages(), *(path.name for path in (ROOT / "docs").glob("*.md"))}
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    assert set(re.findall(r"([\w/-]+\.md)$", navigation, re.MULTILINE)) == pages


@pytest.mark.parametrize(
    ("folder", "link", "expected"),
    [
        ("", "docs/jax.md#memory", "jax.md#memory"),
        ("", "CHANGELOG.md", "changelog.md"),
        ("", "docs/performance/batch.svg", "performance/batch.svg"),
        ("docs", "cli.md#exit-codes", "cli.md#exit-codes"),
        ("docs", "../examples/finetune_flax.py", "examples/finetune_flax.md"),
        ("", "examples/jax_and_keras.ipynb", "examples/jax_and_keras.md"),
        ("docs", "../SECURITY.md", "security-policy.md"),
        ("docs", "#memory", "#memory"),
        ("docs", "https://a.example/docs/x.md", "https://a.example/docs/x.md"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(folder: str, link: str, expected: str) -> None:
    assert site.relinked(f"see [it]({link}).", folder) == f"see [it]({expected})."


def test_the_check_finds_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monoblock, "_NAMES", frozenset({"pipeline", "set_seed"}))
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "a.html").write_text(
        '<h2 id="monoblock.pipeline"></h2><a href="../index.html#top">up</a>'
    )
    (tmp_path / "index.html").write_text(
        '<p id="top"></p><a href="api/a.html#x">a</a><a href="b.html">b</a><a href="#top">c</a>'
        '<script src="https://a.example/a.js"></script><img src="c.png"><link rel="canonical" href="https://a.example">'
    )
    assert check.faults(tmp_path) == [
        "index.html: api/a.html#x: no such anchor",
        "index.html: b.html: no such page",
        "index.html: https://a.example/a.js: an external resource",
        "index.html: c.png: no such file",
        "api: set_seed is not described",
    ]
    assert check.faults(tmp_path / "none") != []
