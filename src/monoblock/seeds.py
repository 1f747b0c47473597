"""`set_seed`: seed all global random number generators; validation of seeds."""

from __future__ import annotations

import importlib
import operator
import random
import sys
from typing import Any

from monoblock.field_types import brief
from monoblock.installed import installed

# The range of seeds in every framework: 64 bits, signed or unsigned.
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1


def checked_seed(seed: Any) -> int:
    """A valid seed as an int; ValueError if it is not one."""
    try:
        found = MIN_SEED - 1 if isinstance(seed, bool) else operator.index(seed)
    except (TypeError, ValueError, RuntimeError):  # not a number, or an array of several
        found = MIN_SEED - 1
    if not MIN_SEED <= found <= MAX_SEED:
        raise ValueError(f"seed must be an integer of 64 bits, at most {MAX_SEED}, got {brief(seed)}")
    return found


def advance(seed: int, count: int) -> int:
    """The seed plus `count`, modulo 2**64."""
    return (seed + count) % (MAX_SEED + 1)


def signed(seed: int) -> int:
    """A seed as a signed integer with the same 64 bits."""
    return seed - 2**64 if seed >= 2**63 else seed


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (all devices), and TensorFlow's.

    NumPy and PyTorch are imported if they are installed; TensorFlow is seeded only if it is already imported. JAX has
    no global generator: pass `seed` to its models. `deterministic`: make PyTorch use deterministic algorithms, and
    raise an error for operations that have none.
    """
    seed = checked_seed(seed)
    random.seed(seed)
    if (numpy := _module("numpy")) is not None:
        numpy.random.seed(seed % 2**32)
    if (torch := _module("torch")) is not None:
        torch.manual_seed(seed)
        if deterministic:
            torch.use_deterministic_algorithms(True)
    elif deterministic:
        raise ValueError("set_seed(deterministic=True) needs PyTorch, which is not installed")
    if (tensorflow := sys.modules.get("tensorflow")) is not None:
        tensorflow.random.set_seed(signed(seed))


def _module(name: str) -> Any:
    return importlib.import_module(name) if installed(name) else None
