"""The documents are current: the table of classes, links and anchors, the options of the command line."""

from __future__ import annotations

import importlib
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import typer.main
from packaging.requirements import Requirement

from monoblock.cli.app import COMMANDS

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / ".github").rglob("*.md")])
FENCE = re.compile(r"^( *```).*?^\1$", flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub and the documentation site derive them."""
    prose = FENCE.sub("", document.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def options(command: str) -> set[str]:
    module = importlib.import_module(f"monoblock.cli.{command}")
    parameters = typer.main.get_command(module.app).params
    return {name for p in parameters for name in (*p.opts, *p.secondary_opts) if name.startswith("-")}


def test_the_table_of_classes_is_current() -> None:
    file = ROOT / "tools" / "support_table.py"
    spec = importlib.util.spec_from_file_location("support_table", file)
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tool.updated(text) == text, "run: python tools/support_table.py"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_anchors_exist(document: Path) -> None:
    prose = FENCE.sub("", document.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)", prose):
        if not link.startswith(("https://", "http://")):
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_are_wrapped(document: Path) -> None:
    """At 110 columns: prose and lists; tables, code, images and a single long word need not be."""
    prose = FENCE.sub("", document.read_text(encoding="utf-8"))
    long = [
        line for line in prose.splitlines() if len(line) > 110 and not line.startswith(("|", "![", "<!--"))
    ]
    assert [line for line in long if " " in line.lstrip(" -")] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_line_option_is_documented(command: str) -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert f"## monoblock {command}" in text
    found = options(command)
    assert "--debug" in found
    default = {"--stream"}  # the default
    assert {name for name in found - default if not re.search(f"`{name}[` ]", text)} == set()


def test_documented_options_exist() -> None:
    known = set().union(
        *map(options, COMMANDS), {"--help", "--version", "--install-completion", "--show-completion"}
    )
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(?:monoblock )?(--[a-z-]+)", text)) <= known


def test_the_first_screen_of_the_readme() -> None:
    """pip install, five lines of code, the sentence about the import line, a figure, the two commands."""
    first = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:30])
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```$", first, flags=re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks] == ["sh", "python", "sh"]
    install, code, commands = (text.splitlines() for _, text in blocks)
    assert len(install) == 1 and install[0].startswith("pip install ")
    assert len([line for line in code if line]) == 5
    assert "Change `transformers` to `monoblock`" in first and "keep the rest" in first
    assert first.count("![") == 1
    assert [line.split("#")[0].strip() for line in commands] == ["make demo", "make test"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets)


def test_the_check_script_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make test" in script.read_text()


def test_constraints_satisfy_the_requirements() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    tested = {name.lower().replace("-", "_"): version for name, version in tested.items()}
    assert not any("+" in version for version in tested.values())
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"]
    names = ("torch", "jax", "tf", "test", "ecosystem", "docs", "notebooks")
    required = [line for name in names for line in extras[name]]
    for line in [*project["dependencies"], *required]:
        requirement = Requirement(line)
        if requirement.name != "monoblock" and (requirement.marker is None or requirement.marker.evaluate()):
            assert requirement.specifier.contains(tested[requirement.name.lower().replace("-", "_")]), line
