"""XLA's settings for tests of JAX and TensorFlow: tiny models take longer to compile than to run.

To be set before either framework is imported. Which code XLA emits is not what is tested: its older emitters take half
the time of the present ones, and one part for each program less than 32.
"""

from __future__ import annotations

import os

FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def flags(*more: str) -> str:
    """XLA_FLAGS with these and more."""
    given = os.environ.get("XLA_FLAGS", "").split()
    return " ".join(dict.fromkeys((*given, *FLAGS, *more)))


def environment() -> dict[str, str]:
    """For a process that tests start, which does not know this module."""
    return {"XLA_FLAGS": flags(), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
