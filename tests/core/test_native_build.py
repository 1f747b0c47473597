"""Build and selection of the native kernels, without a framework. A small library replaces the real sources."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from monoblock import native
from monoblock.native import abi, build

COMPILER = build.compiler()
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is installed")

SMALL = """
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int mb_level() { return 0; }
EXPORT const char* mb_sources() { return MB_SOURCES; }
EXPORT int mb_openmp() {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}
struct Entry { const char* name; long long offset, size; };
struct Pair { int first; double second; };
static const Entry LAYOUT[] = {
    {"Pair", 0, sizeof(Pair)}, {"Pair.first", 0, 4}, {"Pair.second", 8, 8}, {nullptr, 0, 0}};
EXPORT const Entry* mb_layout() { return LAYOUT; }
"""


class Pair(ctypes.Structure):
    """`Pair` of these sources."""

    _fields_ = [("first", ctypes.c_int), ("second", ctypes.c_double)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the small sources, used for builds and for selection."""
    (tmp_path / "kernels.cpp").write_text(SMALL)
    monkeypatch.setattr(build, "HERE", tmp_path)
    path_of = build.path_of
    monkeypatch.setattr(build, "path_of", lambda level, folder=tmp_path: path_of(level, folder))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


def libraries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"kernels.cpp"}


@needs_compiler
def test_every_level_of_this_machine_is_built(folder: Path) -> None:
    outcome = build.build(folder)
    assert outcome.levels == tuple(build.levels())
    assert libraries(folder) == {f"kernels_{level}.so" for level in build.levels()}  # and no other files
    assert "were built by" in outcome.line
    ready = build.ready(folder)  # another install need not compile again
    assert ready is not None and ready.levels == outcome.levels
    (folder / "kernels.cpp").write_text(SMALL + "// changed\n")
    assert build.ready(folder) is None


@pytest.mark.parametrize(
    ("machine", "levels"),
    [
        ("AMD64", ["base", "avx2", "avx512", "avx512_vnni_bf16", "avx512_amx"]),
        ("arm64", ["base", "neon_dotprod", "neon_i8mm_bf16", "sve256"]),
        ("riscv64", ["base"]),
    ],
)
def test_each_architecture_has_its_levels(
    machine: str, levels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(build.levels(machine)) == levels
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    assert list(build.levels()) == levels
    assert native.choose("fast")[2] == (f"off: MONOBLOCK_NATIVE is 'fast', not one of 0, {', '.join(levels)}")


def test_levels_with_dot_products_exist() -> None:
    levels = {level for table in build.LEVELS.values() for level in table}
    assert set(native.BF16_DOT_PRODUCTS) < set(native.INT8_DOT_PRODUCTS) < levels


# AT_HWCAP: atomics 8, dot product 20, SVE 22. AT_HWCAP2: SVE i8mm 9, SVE bf16 12, i8mm 13, bf16 14 (<asm/hwcap.h>).
DOT, SVE = 1 << 8 | 1 << 20, 1 << 22
BOTH, SVE_BOTH = 1 << 13 | 1 << 14, 1 << 9 | 1 << 12
MACHINES = {
    "Cortex-A72": (0, 0, 0, "base"),
    "dot products without the atomics of Armv8.1": (1 << 20, BOTH, 0, "base"),
    "Neoverse N1": (DOT, 0, 0, "neon_dotprod"),
    "i8mm alone": (DOT, 1 << 13, 0, "neon_dotprod"),
    "bf16 alone": (DOT, 1 << 14, 0, "neon_dotprod"),
    "Apple M2": (DOT, BOTH, 0, "neon_i8mm_bf16"),
    "Neoverse V1": (DOT | SVE, BOTH | SVE_BOTH, 32, "sve256"),
    "Neoverse V2": (DOT | SVE, BOTH | SVE_BOTH, 16, "neon_i8mm_bf16"),
    "512 bits": (DOT | SVE, BOTH | SVE_BOTH, 64, "neon_i8mm_bf16"),
    "SVE without bf16": (DOT | SVE, BOTH | 1 << 9, 32, "neon_i8mm_bf16"),
    "A64FX": (1 << 8 | SVE, 0, 64, "base"),
}


@needs_compiler
def test_the_level_of_an_arm_machine(tmp_path: Path) -> None:
    source, made = tmp_path / "level.cpp", tmp_path / "level.so"
    source.write_text(f"""#include "{build.HERE / "arm_level.hpp"}"
extern "C" int level(uint64_t hwcap, uint64_t hwcap2, int vector_bytes) {{
  return arm_level::level_of(arm_level::features_of(hwcap, hwcap2, vector_bytes));
}}
""")
    assert COMPILER is not None
    subprocess.run([*COMPILER, "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(made)], check=True)
    level_of = ctypes.CDLL(str(made)).level
    level_of.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int)
    levels = list(build.levels("aarch64"))
    found = {name: levels[level_of(*machine[:3])] for name, machine in MACHINES.items()}
    assert found == {name: level for name, (*_, level) in MACHINES.items()}


def test_a_build_for_another_architecture(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The compiler's commands, without the compiler."""
    commands: list[list[str]] = []

    def compiled(command: list[str], seconds: float = 600) -> str:
        commands.append(command)
        Path(command[-1]).write_text("")
        return ""

    monkeypatch.setattr(build, "_run", compiled)
    made = folder / "made"
    made.mkdir()
    cross = ["--target", "aarch64", "--compiler", f"{sys.executable} -v", "--folder", str(made)]
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    assert build.main(cross) == 0
    assert "base, neon_dotprod, neon_i8mm_bf16, sve256" in capsys.readouterr().out
    assert libraries(made) == {f"kernels_{level}.so" for level in build.levels("aarch64")}
    assert all(command[:2] == [sys.executable, "-v"] for command in commands)
    flags = {
        Path(command[-1]).stem: command for command in commands if str(folder / "kernels.cpp") in command
    }
    assert "-march=armv8.2-a+dotprod" in flags["kernels_neon_dotprod"]
    assert "-march=armv8.2-a+dotprod+i8mm+bf16" in flags["kernels_neon_i8mm_bf16"]
    assert "-msve-vector-bits=256" in flags["kernels_sve256"]
    assert not any(flag.startswith("-m") for flag in flags["kernels_base"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sparc"], "--target sparc: expected x86_64 or aarch64"),
        (["--target", "aarch64"], "--target aarch64 needs --compiler with a cross compiler, and a --folder"),
        (["--compiler", "no-such-compiler"], "--compiler no-such-compiler: not found"),
        (["--folder", "no-such-folder"], "--folder no-such-folder: there is no such folder"),
    ],
)
def test_a_build_that_cannot_be_is_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    with pytest.raises(SystemExit):
        build.main(arguments)
    assert message in capsys.readouterr().err


def test_a_missing_compiler_is_reported_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "kernels_base.so").write_text("of another compiler")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    outcome = build.build(folder)
    assert outcome.levels == ()
    assert outcome.line == (
        "monoblock is installed without its native kernels: CXX='/nowhere/c++' was not found; "
        "PyTorch's kernels are used instead."
    )
    assert libraries(folder) == set()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler (g++ or clang++) was found" in build.build(folder).line


def test_cxx_with_arguments() -> None:
    assert build.compiler({"CXX": f"{sys.executable} -m thing"}) == [sys.executable, "-m", "thing"]


@needs_compiler
def test_a_compiler_error_is_reported_in_one_line(folder: Path) -> None:
    assert build.build(folder).levels
    (folder / "kernels.cpp").write_text("this is not C++;\n")
    outcome = build.build(folder)
    assert outcome.levels == () and "\n" not in outcome.line and "error" in outcome.line
    assert libraries(folder) == set()


@needs_compiler
def test_a_level_that_fails_to_build_is_named(folder: Path) -> None:
    if len(build.levels()) == 1:
        pytest.skip("this kind of machine has one level")
    (folder / "kernels.cpp").write_text(SMALL + "#ifdef __AVX512F__\n#error no such registers\n#endif\n")
    outcome = build.build(folder)
    assert outcome.levels == ("base", "avx2")
    assert "not avx512" in outcome.line and "no such registers" in outcome.line


def test_monoblock_native_selects_the_level() -> None:
    assert native.choose("0") == (None, None, "off: MONOBLOCK_NATIVE is 0")
    _, level, status = native.choose("fast")
    assert level is None and "'fast', not one of 0, base, avx2" in status


def test_missing_libraries_are_reported(folder: Path) -> None:
    assert folder.exists()
    found = native.choose("")
    assert found[:2] == (None, None)
    assert found[2].startswith("none: not built; build it by python -m monoblock.native.build")


@pytest.fixture
def small_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions and structures of the small library replace those of abi.py."""
    functions = {name: abi.SIGNATURES[name] for name in ("mb_sources", "mb_layout", "mb_level", "mb_openmp")}
    monkeypatch.setattr(abi, "SIGNATURES", functions)
    monkeypatch.setattr(abi, "STRUCTURES", (Pair,))


@needs_compiler
def test_a_library_without_all_functions_is_not_used(folder: Path) -> None:
    build.build(folder)
    status = native.choose("")[2]
    assert status.startswith("none: ") and "undefined symbol: mb_amx" in status


@needs_compiler
@pytest.mark.usefixtures("small_interface")
def test_an_outdated_library_is_not_used(folder: Path) -> None:
    build.build(folder)
    assert native.choose("base")[1:] == ("base", "base")
    (folder / "kernels.cpp").write_text(SMALL + "// changed\n")
    assert "built from other sources" in native.choose("base")[2]


INT, DOUBLE = ctypes.c_int, ctypes.c_double
MIRRORS: dict[str, tuple[list[tuple[str, Any]], str]] = {
    "swapped": (
        [("second", DOUBLE), ("first", INT)],
        "Pair.second has 8 bytes at offset 8 in the library and has 8 bytes at offset 0 in native/abi.py",
    ),
    "renamed": (
        [("first", INT), ("last", DOUBLE)],
        "Pair.last is missing in the library and has 8 bytes at offset 8 in native/abi.py",
    ),
    "shorter": (
        [("first", INT)],
        "Pair has 16 bytes at offset 0 in the library and has 4 bytes at offset 0 in native/abi.py",
    ),
    "narrower": (
        [("first", ctypes.c_short), ("second", DOUBLE)],
        "Pair.first has 4 bytes at offset 0 in the library and has 2 bytes at offset 0 in native/abi.py",
    ),
}


@needs_compiler
@pytest.mark.usefixtures("small_interface")
@pytest.mark.parametrize("mirror", MIRRORS)
def test_a_library_with_other_structures_is_not_used(
    mirror: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.build(folder)
    fields, difference = MIRRORS[mirror]
    monkeypatch.setattr(abi, "STRUCTURES", (type("Pair", (ctypes.Structure,), {"_fields_": fields}),))
    library, level, status = native.choose("base")
    assert (library, level) == (None, None)
    assert status == f"none: {difference}; the versions differ: reinstall monoblock"


@needs_compiler
@pytest.mark.usefixtures("small_interface")
def test_a_structure_missing_in_python_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.build(folder)
    monkeypatch.setattr(abi, "STRUCTURES", ())
    assert "Pair" in native.choose("base")[2] and "is missing in native/abi.py" in native.choose("base")[2]


def test_all_structures_of_abi_are_compared() -> None:
    declared = {
        kind for kind in vars(abi).values() if isinstance(kind, type) and issubclass(kind, ctypes.Structure)
    }
    assert declared - {ctypes.Structure, abi.LayoutEntry} == set(abi.STRUCTURES)


@needs_compiler
@pytest.mark.usefixtures("small_interface")
@pytest.mark.parametrize("openmp", [True, False])
def test_a_build_without_openmp_is_reported(
    openmp: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build._run

    def compiled(command: list[str], seconds: float = 600) -> str:
        if not openmp and "-fopenmp" in command:
            return "unsupported option '-fopenmp'"
        return run(command, seconds)

    monkeypatch.setattr(build, "_run", compiled)
    outcome = build.build(folder)
    assert outcome.levels == tuple(build.levels())
    found = native.choose("base")
    library, level, status = found
    assert level == "base"
    if openmp and status != "base":
        pytest.skip("this compiler has no OpenMP")
    assert openmp or status == "base; built without OpenMP: on threads of its own"
    assert openmp != outcome.line.endswith("; without OpenMP: on threads of their own")
    monkeypatch.setattr(native, "_opened", lambda: found)
    assert native.library() is library and native.has_openmp(library) == openmp


@needs_compiler
@pytest.mark.usefixtures("small_interface")
def test_kernels_load_beside_a_stand_in_for_pytorch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module without a spec names no file, so its OpenMP runtime cannot be looked for."""
    build.build(folder)
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    assert native.choose("base")[1] == "base"


@pytest.mark.skipif(native.library() is None, reason=f"native kernels: {native.status()}")
def test_the_built_kernels_load_at_every_supported_level() -> None:
    names = list(build.levels())
    highest = names.index(native.choose("")[1] or "base")
    for name in names[: highest + 1]:
        assert native.choose(name)[1] == name


def test_env_reports_the_kernels_in_use() -> None:
    command = [sys.executable, "-m", "monoblock.cli", "env", "--json"]
    off = {**os.environ, native.VARIABLE: "0"}
    for environ, expected in ((off, "off: MONOBLOCK_NATIVE is 0"), ({**os.environ}, native.status())):
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=True)
        assert json.loads(done.stdout)["native_kernels"] == expected


def test_a_compiler_timeout_kills_the_process_group(tmp_path: Path) -> None:
    """A driver such as g++ runs the compiler in a child process."""
    heartbeat = tmp_path / "alive"
    script = f"(while :; do echo >> {heartbeat}; sleep 0.05; done) & wait"
    assert build._run(["sh", "-c", script], seconds=1) == "sh took more than 1 s"
    size = heartbeat.stat().st_size
    time.sleep(0.5)
    assert heartbeat.stat().st_size == size > 0
