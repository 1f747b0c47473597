"""The machine: its hardware, and its measured limits of memory bandwidth and matrix products."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

GEMM = (512, 5632, 2048)  # a prompt of 512 tokens through a matrix of a 1B model

IMPORTS = (
    "pass",
    "import monoblock",
    "import torch",
    "from monoblock import MptForCausalLM",
    "from transformers import MptForCausalLM",
)


def describe() -> dict[str, Any]:
    """The hardware, and versions shared by all backends."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "units": _units(),
        "cores": len(os.sched_getaffinity(0)),
        "memory GiB": round(pages / 2**30),
        "python": platform.python_version(),
        "torch": version("torch"),
        "system": platform.system(),
    }


def _units() -> list[str]:
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    flags = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), ""
    )
    return [unit for unit in known if unit in flags.split()]


def line(found: dict[str, Any], limits: list[dict[str, float]]) -> str:
    """A line on the hardware and its limits."""
    rates = "; ".join(
        f"{name} {_range([one[name] for one in limits])}" for name in limits[0] if limits[0][name]
    )
    return (
        f"{found['cores']} cores of {found['cpu']} ({', '.join(found['units'])}), {found['memory GiB']} GiB, "
        f"{found['system']}, Python {found['python']}, PyTorch {found['torch']}; at the start and the end: {rates}"
    )


def _range(values: list[float]) -> str:
    return " / ".join(f"{value:.3g}" for value in values)


class Memory:
    """A block of memory for measuring the read bandwidth, which varies on shared machines."""

    def __init__(self, threads: int) -> None:
        import torch

        from monoblock.cli.bench import Memory as Block

        torch.set_num_threads(threads)
        self.block = Block(torch.device("cpu"))

    def rate(self, tries: int = 2) -> float:
        """GB/s, the best of several tries."""
        return self.block.rate(tries) / 1e9


def limits(memory: Memory) -> dict[str, float]:
    """Read bandwidth in GB/s and matrix products in TFLOP/s (TOP/s) by dtype, each the best of several tries."""
    import torch

    rows, outputs, inputs = GEMM
    operations = 2e-12 * rows * outputs * inputs
    x, w = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    halves = [t.to(torch.bfloat16) for t in (x, w)]
    codes = [(t * 20).to(torch.int8) for t in (x, w)]
    best = {
        # oneDNN's product: on some machines that of `F.linear` is far slower.
        "float32 TFLOP/s": lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),
        "bfloat16 TFLOP/s": lambda: torch.nn.functional.linear(*halves),
        "int8 TOP/s": lambda: torch._int_mm(codes[0], codes[1].T),
    }
    with torch.inference_mode():
        rates = {name: operations / _best(work, 7) for name, work in best.items()}
    return {"read GB/s": memory.rate(tries=4)} | rates


def fresh(size: int, threads: int) -> float:
    """Seconds in which a new process allocates and writes `size` bytes with all threads. The host of a virtual machine
    may have to provide the memory, which then stays available for a second or two."""
    code = (
        f"import time, torch; torch.set_num_threads({threads}); begin = time.perf_counter();"
        f"torch.empty({size}, dtype=torch.uint8).fill_(1); print(time.perf_counter() - begin)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    return float(done.stdout)


def read_once(source: Path) -> None:
    """Reads a file, or the files of a folder, into the page cache."""
    for file in [source] if source.is_file() else filter(Path.is_file, source.rglob("*")):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def processes(runs: int = 5) -> dict[str, list[float]]:
    """Seconds of complete processes that load no model, alternating."""
    commands = {f"python -c '{code}'": [sys.executable, "-c", code] for code in IMPORTS}
    commands["monoblock --help"] = [str(Path(sys.executable).with_name("monoblock")), "--help"]
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs + 1):
        for name, command in commands.items():
            begin = time.perf_counter()
            done = subprocess.run(command, capture_output=True, check=False)
            if not done.returncode:  # not measured if not installed
                found[name].append(time.perf_counter() - begin)
    return {name: seconds[1:] for name, seconds in found.items() if seconds}


def _best(work: Callable[[], Any], tries: int) -> float:
    work()
    seconds: list[float] = []
    for _ in range(tries):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
