"""Settings of every test of the JAX backend."""

from __future__ import annotations

import os

import xla_test_flags

os.environ["XLA_FLAGS"] = xla_test_flags.flags()

import jax
import pytest

# The same again as XLA's flags, and what JAX does before it.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="session")
def _programs_on_disk(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one file has compiled, others read: between files, and for new functions, JAX forgets its programs."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
