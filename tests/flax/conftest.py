"""Settings for the tests of the JAX backend: fast compilation, and a cache of compiled programs."""

from __future__ import annotations

import os

import xla_test_flags

os.environ["XLA_FLAGS"] = xla_test_flags.flags()

import jax
import pytest

# As the flags of XLA, and also for JAX's own passes.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="session")
def _programs_on_disk(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Programs compiled in one test file are cached on disk for the others, as JAX's cache is cleared between them."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
