"""`monoblock env`: versions and hardware for bug reports; imports no framework."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from monoblock import native
from monoblock.cli import console
from monoblock.cli.app import EXIT_CODES, sub_app
from monoblock.cli.options import Json
from monoblock.generation.limits import host_memory
from monoblock.native import tuning

app = sub_app()

FRAMEWORKS = {
    "PyTorch": ("torch",),
    "JAX": ("jax", "flax"),
    "TensorFlow": ("tensorflow", "tensorflow-cpu", "keras"),
}
PACKAGES = ("numpy", "safetensors", "tokenizers", "huggingface_hub", "jinja2", "accelerate", "transformers")

# Vector and matrix extensions that matter for speed, by their names in /proc/cpuinfo.
CPU_UNITS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni"),
    *("avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)


@app.command(epilog=EXIT_CODES)
@console.command
def env(*, as_json: Json = False) -> None:
    """Show versions, frameworks, CPU, memory and GPUs; for bug reports."""
    found = describe()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    console.rows("monoblock env", [(name, _text(value)) for name, value in found.items()])


def describe() -> dict[str, Any]:
    """All results of `monoblock env`, by name. Sizes in bytes; None: not installed or unknown."""
    frameworks = {
        name: {p: v for p in packages if (v := _version(p))} or None for name, packages in FRAMEWORKS.items()
    }
    fields = tuning.cpu_fields()
    units = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "monoblock": _version("monoblock"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **frameworks,
        **{name: _version(name) for name in PACKAGES},
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cpu_units": [unit for unit in CPU_UNITS if unit in units],
        "native_kernels": native.status(),
        "native_plans": _plans(),
        "threads": _threads(),
        "memory": host_memory() or "not known",
        "gpus": _gpus(),
    }


def _plans() -> dict[str, str] | str:
    """How native products read their weights, by format and rows of inputs, as measured on this machine."""
    if native.library() is None:
        return "no native kernels"
    if (chosen := tuning.setting()) not in ("on", "force"):
        return f"{tuning.VARIABLE}: {chosen if chosen == 'off' else os.environ[tuning.VARIABLE]}"
    return {
        f"{form}, {rows} row{'s' * (rows > 1)}, {threads} thread{'s' * (threads > 1)}": str(choice)
        for threads, choices in tuning.stored(native.level()).items()
        for (form, rows), choice in choices.items()
    } or "defaults; the first model larger than the last cache has them measured"


def _text(value: Any) -> str:
    match value:
        case None:
            return "not installed"
        case dict():
            return ", ".join(f"{name} {number}" for name, number in value.items())
        case []:
            return "none found"
        case list():
            return ", ".join(value)
        case int() if value > 1 << 20:
            return f"{value / 2**30:.1f} GiB"
        case _:
            return str(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _threads() -> int:
    """Number of CPUs available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpus() -> list[str]:
    """NVIDIA GPUs as listed by nvidia-smi, and Apple GPUs."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return ["Apple GPU (mps)"]
    tool = shutil.which("nvidia-smi")
    if not tool:
        return []
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip().replace(",", ";") for line in result.stdout.splitlines() if line.strip()]
