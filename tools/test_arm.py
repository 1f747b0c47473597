"""Runs the tests of the native kernels for AArch64 under qemu: `python tools/test_arm.py [arguments of pytest]`.

1. A Python for arm64 from the distribution's packages, unpacked into `build/arm/root` (the system's own packages are
   left alone), with the packages of `tools/arm/packages.txt`. Both are kept for the next run.
2. Every level is compiled, by the cross compiler.
3. The level that the library chooses on each of several CPUs.
4. The tests of the native kernels: on a CPU with all levels, whole; on older CPUs, the products and the prompt kernels.

qemu proves numbers and instructions, and says nothing about speed. Needs Debian or Ubuntu with Python 3.11 or newer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "arm"
ROOTFS, SITE, SOURCES = BUILD / "root", BUILD / "site", BUILD / "src"
PYTHON = BUILD / "python"  # runs the arm64 Python; its variable CPU names qemu's CPU
COMPILER = "aarch64-linux-gnu-g++"
# Commands, by the distribution's packages that contain them.
NEEDED = {
    COMPILER: "g++-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
}
DISTRIBUTION = ("python3", "libgomp1", "libstdc++6")

# The level that each of qemu's CPUs must get.
ALL = "max,sve256=on,sve512=off"
LEVELS = {
    "cortex-a57": "base",
    "cortex-a72": "base",
    "a64fx": "base",  # SVE of 512 bits, no dot products in NEON
    "cortex-a76": "neon_dotprod",
    "neoverse-n1": "neon_dotprod",
    "max,sve=off": "neon_i8mm_bf16",
    "max,sve128=on,sve256=off": "neon_i8mm_bf16",
    "max": "neon_i8mm_bf16",  # SVE of 512 bits
    ALL: "sve256",
}
TESTS = (
    "torch/test_linear",
    "torch/test_prompt",
    "torch/test_attention_kernels",
    "torch/test_fused",
    "torch/test_group_formats",
    "torch/test_lossless",
    "torch/test_low_rank",
    "torch/test_native_numbers",
    "torch/test_packed_forward",
    "serving/test_paged_step",
)
OLDER = {"cortex-a57": TESTS[:2], "neoverse-n1": TESTS[:2], "max,sve=off": TESTS[:2]}

# Processes that tests start are of this architecture too: the kernel runs a script's interpreter, and that starts qemu.
RUN = "import sys; sys.executable = {python!r}; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
STATUS = "from monoblock import native; print(native.level())"


def main(arguments: list[str]) -> int:
    """Returns the exit status of the first tests that fail."""
    missing = [name for name in NEEDED if not shutil.which(name)]
    if missing:
        packages = " ".join(NEEDED[name] for name in missing)
        raise SystemExit(f"{' and '.join(missing)} not found: install them by apt-get install {packages}")
    BUILD.mkdir(parents=True, exist_ok=True)
    _once(ROOTFS, repr(DISTRIBUTION), _make_root)
    _once(SITE, (ROOT / "tools" / "arm" / "packages.txt").read_text(encoding="utf-8"), _install_packages)
    _write_launcher()
    _compile()
    for cpu, level in LEVELS.items():
        found = _python(cpu, "-c", STATUS, capture=True).stdout.strip()
        print(f"{cpu}: {found}", flush=True)
        if found != level:
            raise SystemExit(f"{cpu}: the library chose {found}, and {level} was expected")
    for cpu, tests in {**({} if arguments else OLDER), ALL: TESTS}.items():
        print(f"== tests on {cpu}", flush=True)
        files = [str(ROOT / "tests" / f"{name}.py") for name in tests]
        run = RUN.format(python=str(PYTHON))
        done = _python(cpu, "-c", run, "-p", "no:cacheprovider", *files, *arguments)
        if done.returncode:
            return done.returncode
    return 0


def _run(*command: str | Path, **more: object) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload]
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout}{done.stderr}")


def _once(folder: Path, key: str, make: Callable[[], None]) -> None:
    """Makes a folder again if its key has changed."""
    stamp = folder.with_name(f"{folder.name}.made")
    if folder.is_dir() and stamp.is_file() and stamp.read_text(encoding="utf-8") == key:
        return
    print(f"== making {folder.relative_to(ROOT)}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    stamp.unlink(missing_ok=True)
    make()
    stamp.write_text(key, encoding="utf-8")


def _make_root() -> None:
    """Unpacks the packages for arm64, with an apt of its own state: nothing of the system is changed."""
    apt = BUILD / "apt"
    shutil.rmtree(apt, ignore_errors=True)
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True)
    (apt / "status").touch()
    configuration = apt / "apt.conf"
    lines = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "root",
        "Dir::State": str(apt / "state"),
        "Dir::State::status": str(apt / "status"),
        "Dir::Cache": str(apt / "cache"),
    }
    configuration.write_text("".join(f'{name} "{value}";\n' for name, value in lines.items()))
    environment = {**os.environ, "APT_CONFIG": str(configuration)}
    _run("apt-get", "update", env=environment)
    download = ("--yes", "--download-only", "--no-install-recommends")
    _run("apt-get", "install", *download, *DISTRIBUTION, env=environment)
    ROOTFS.mkdir()
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        _run("dpkg-deb", "--extract", package, ROOTFS)
    shutil.rmtree(apt)


def _install_packages() -> None:
    """Wheels for aarch64 and the version of the root's Python."""
    version = (ROOTFS / "usr" / "bin" / "python3").readlink().name.removeprefix("python")
    if tuple(map(int, version.split("."))) < (3, 11):
        raise SystemExit(
            f"the distribution's Python is {version}, and 3.11 or newer is needed: use a newer release"
        )
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    pins = {name.strip().lower().replace("_", "-"): pin for name, pin in pins.items()}
    wanted = []
    for line in (ROOT / "tools" / "arm" / "packages.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = pins.get(line.lower().replace("_", "-"))
            wanted.append(f"{line}=={pin}" if pin else line)
    platforms = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
    _run(
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-compile"),
        *("--target", SITE, "--only-binary=:all:", "--implementation", "cp", "--python-version", version),
        *(f"--platform={name}" for name in platforms),
        *wanted,
    )


def _write_launcher() -> None:
    qemu = shutil.which("qemu-aarch64")
    PYTHON.write_text(f'#!/bin/sh\nexec "{qemu}" -cpu "$CPU" -L "{ROOTFS}" "{ROOTFS}/usr/bin/python3" "$@"\n')
    PYTHON.chmod(0o755)


def _compile() -> None:
    """A copy of the package with its kernels for AArch64, in which a level that was not built is an error."""
    package = SOURCES / "monoblock"
    kept = BUILD / "libraries"  # of an earlier run; the build makes them again if the sources have changed
    kept.mkdir(exist_ok=True)
    shutil.rmtree(SOURCES, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "src" / "monoblock", package, ignore=ignored)
    sys.path.insert(0, str(SOURCES))
    from monoblock.native import build

    if build.ready(kept, "aarch64") is None:
        print("== compiling (minutes)", flush=True)
        outcome = build.build(kept, seconds=3600, target="aarch64", command=[COMPILER])
        print(outcome.line, flush=True)
        if outcome.levels != tuple(build.levels("aarch64")):
            raise SystemExit("a level was not built")
    for library in kept.glob("*.so"):
        shutil.copy2(library, package / "native")


def _python(cpu: str, *arguments: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "CPU": cpu,
        "PYTHONPATH": f"{SOURCES}:{SITE}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "2",
        "PATH": str(
            BUILD / "empty"
        ),  # without compilers: those of this machine compile for it, not for AArch64
    }
    for name in ("MONOBLOCK_NATIVE", "CXX", "CC"):
        environment.pop(name, None)
    return subprocess.run(
        [str(PYTHON), *arguments],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=capture,
        text=True,
        check=False,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
