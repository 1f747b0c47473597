"""The documents agree with the code: the support table, links, command-line options, constraints."""

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
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def options(command: str) -> set[str]:
    module = importlib.import_module(f"monoblock.cli.{command}")
    parameters = typer.main.get_command(module.app).params
    return {name for p in parameters for name in (*p.opts, *p.secondary_opts) if name.startswith("-")}


def test_the_support_table_is_up_to_date() -> None:
    file = ROOT / "tools" / "support_table.py"
    spec = importlib.util.spec_from_file_location("support_table", file)
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tool.updated(text) == text, "run: python tools/support_table.py"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_exist(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8"))
    files = [link for link in links if not link.startswith(("https://", "http://"))]
    assert [link for link in files if not (document.parent / link).exists()] == []


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


def test_readme_starts_with_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first = text.partition("```sh\n")[2].partition("```")[0]
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["make demo", "make test"]
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
    required = [line for name in ("torch", "jax", "tf", "test", "ecosystem") for line in extras[name]]
    for line in [*project["dependencies"], *required]:
        requirement = Requirement(line)
        if requirement.name != "monoblock" and (requirement.marker is None or requirement.marker.evaluate()):
            assert requirement.specifier.contains(tested[requirement.name.lower().replace("-", "_")]), line
