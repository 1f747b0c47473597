"""XLA flags that shorten compilation in tests of JAX and TensorFlow, whose tiny models compile longer than they run.

They must be set before either framework is imported. Without fusion emitters compilation takes half the time; one code
generation split is faster than the default of 32.
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
    """The value of XLA_FLAGS with `FLAGS` and `more` added."""
    given = os.environ.get("XLA_FLAGS", "").split()
    return " ".join(dict.fromkeys((*given, *FLAGS, *more)))


def environment() -> dict[str, str]:
    """Environment variables for processes that tests start."""
    return {"XLA_FLAGS": flags(), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
