"""`set_seed`: one seed for every global source of random numbers."""

from __future__ import annotations

import importlib
import operator
import random
import sys
from typing import Any

from monoblock.field_types import brief
from monoblock.installed import installed

# What every framework's generators take: 64 bits, signed or not.
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1


def checked_seed(seed: Any) -> int:
    """The seed of a generator; ValueError for what is none."""
    try:
        found = MIN_SEED - 1 if isinstance(seed, bool) else operator.index(seed)
    except (TypeError, ValueError, RuntimeError):  # of no number, or an array of several
        found = MIN_SEED - 1
    if not MIN_SEED <= found <= MAX_SEED:
        raise ValueError(f"seed must be a whole number of 64 bits, at most {MAX_SEED}, got {brief(seed)}")
    return found


def advance(seed: int, count: int) -> int:
    """The seed that many after this one; after the highest comes 0."""
    return (seed + count) % (MAX_SEED + 1)


def signed(seed: int) -> int:
    """A checked seed with a sign, which is the same 64 bits."""
    return seed - 2**64 if seed >= 2**63 else seed


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (all devices), and TensorFlow's.

    NumPy and PyTorch are imported for that where they are installed; TensorFlow's is seeded if it is imported already.
    JAX has no global generator: give its models `seed`. `deterministic`: PyTorch uses deterministic algorithms from
    now on, and raises where an operation has none.
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
        raise ValueError("set_seed(deterministic=True) is for PyTorch, which is not installed")
    if (tensorflow := sys.modules.get("tensorflow")) is not None:
        tensorflow.random.set_seed(signed(seed))


def _module(name: str) -> Any:
    return importlib.import_module(name) if installed(name) else None
