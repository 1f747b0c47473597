"""The native kernels' build and choice, without any framework. Small sources stand in for the real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from monoblock import native
from monoblock.native import build

COMPILER = build.compiler()
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is installed")

SMALL = """
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int mb_level() { return 0; }
EXPORT const char* mb_sources() { return MB_SOURCES; }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small sources, which is where the build and the choice look."""
    (tmp_path / "kernels.cpp").write_text(SMALL)
    monkeypatch.setattr(build, "HERE", tmp_path)
    whole = build.path_of
    monkeypatch.setattr(build, "path_of", lambda level, folder=tmp_path: whole(level, folder))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


def libraries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"kernels.cpp"}


@needs_compiler
def test_every_level_of_this_machine_is_built(folder: Path) -> None:
    outcome = build.build(folder)
    assert outcome.levels == tuple(build.levels())
    assert libraries(folder) == {
        f"kernels_{level}.so" for level in build.levels()
    }  # and nothing else is left
    assert "were built by" in outcome.line
    ready = build.ready(folder)  # so that another install need not compile again
    assert ready is not None and ready.levels == outcome.levels
    (folder / "kernels.cpp").write_text(SMALL + "// changed\n")
    assert build.ready(folder) is None


def test_other_machines_have_the_base_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert list(build.levels()) == ["base"]


def test_without_a_compiler_one_clear_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "kernels_base.so").write_text("of another compiler")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    outcome = build.build(folder)
    assert outcome.levels == ()
    assert outcome.line == (
        "monoblock is installed without its native kernels: CXX is '/nowhere/c++', which is no program; "
        "PyTorch does the work."
    )
    assert libraries(folder) == set()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler (g++ or clang++) was found" in build.build(folder).line


def test_cxx_may_hold_arguments() -> None:
    assert build.compiler({"CXX": f"{sys.executable} -m thing"}) == [sys.executable, "-m", "thing"]


@needs_compiler
def test_an_error_of_the_compiler_is_a_line(folder: Path) -> None:
    assert build.build(folder).levels
    (folder / "kernels.cpp").write_text("this is not C++;\n")
    outcome = build.build(folder)
    assert outcome.levels == () and "\n" not in outcome.line and "error" in outcome.line
    assert libraries(folder) == set()


@needs_compiler
def test_a_level_that_cannot_be_built_is_named(folder: Path) -> None:
    if len(build.levels()) == 1:
        pytest.skip("this kind of machine has one level")
    (folder / "kernels.cpp").write_text(SMALL + "#ifdef __AVX512F__\n#error no such registers\n#endif\n")
    outcome = build.build(folder)
    assert outcome.levels == ("base", "avx2")
    assert "not avx512" in outcome.line and "no such registers" in outcome.line


@needs_compiler
def test_threads_are_left_out_where_the_compiler_has_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build._run

    def without_threads(command: list[str]) -> str:
        return "unsupported option '-fopenmp'" if "-fopenmp" in command else whole(command)

    monkeypatch.setattr(build, "_run", without_threads)
    assert build.build(folder).levels == tuple(build.levels())


def test_the_variable_chooses() -> None:
    assert native.choose("0") == (None, None, "off: MONOBLOCK_NATIVE is 0")
    _, level, status = native.choose("fast")
    assert level is None and "'fast', which is none of 0, base, avx2" in status


def test_what_was_not_built_is_said(folder: Path) -> None:
    assert folder.exists()
    found = native.choose("")
    assert found[:2] == (None, None)
    assert found[2].startswith("none: not built; python -m monoblock.native.build")


@needs_compiler
def test_old_and_broken_libraries_are_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.build(folder)
    assert native.choose("")[2].startswith("none: ")  # it lacks the functions
    monkeypatch.setattr(native, "SIGNATURES", {})
    assert native.choose("base")[1:] == ("base", "base")
    (folder / "kernels.cpp").write_text(SMALL + "// changed\n")
    assert "built from other sources" in native.choose("base")[2]


@pytest.mark.skipif(native.library() is None, reason=f"native kernels: {native.status()}")
def test_the_real_kernels_open_at_every_lower_level() -> None:
    names = list(build.LEVELS)
    highest = names.index(native.choose("")[1] or "base")
    for name in names[: highest + 1]:
        assert native.choose(name)[1] == name


def test_env_says_what_is_in_use() -> None:
    command = [sys.executable, "-m", "monoblock.cli", "env", "--json"]
    off = {**os.environ, native.VARIABLE: "0"}
    for environ, expected in ((off, "off: MONOBLOCK_NATIVE is 0"), ({**os.environ}, native.status())):
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=True)
        assert json.loads(done.stdout)["native_kernels"] == expected
