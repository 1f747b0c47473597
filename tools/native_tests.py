"""Runs the tests of the native kernels with other ways to read weights than the default ones.

`python tools/native_tests.py [arguments of pytest]`. Each plan is set for all products by `MONOBLOCK_TUNE`
(native/tuning.py); together they have every hint, number of streams and number of chunks, and no prefetch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = (
    "torch/test_attention_kernels",
    "torch/test_fused",
    "torch/test_linear",
    "torch/test_lossless",
    "torch/test_low_rank",
    "torch/test_native_numbers",
    "torch/test_native_threads",
    "torch/test_packed",
    "torch/test_packed_forward",
    "torch/test_prompt",
    "serving/test_paged_step",
)
PLANS = (
    "hint=temporal,distance=1024,streams=2,chunks=4",
    "hint=non_temporal,distance=3072,streams=4,chunks=8",
    "hint=temporal,distance=0,streams=4,chunks=2",
)


def paths() -> list[str]:
    """The files of the tests."""
    return [str(ROOT / "tests" / f"{name}.py") for name in TESTS]


def main(arguments: list[str]) -> int:
    """Returns the exit status of the first run that fails."""
    for plan in PLANS:
        print(f"== MONOBLOCK_TUNE={plan}", flush=True)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *paths(), *arguments]
        if status := subprocess.call(command, env={**os.environ, "MONOBLOCK_TUNE": plan}, cwd=ROOT):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
