"""`set_seed`: one seed for every global source of random numbers."""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
from typing import Any


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (all devices), and TensorFlow's.

    NumPy and PyTorch are imported for that where they are installed; TensorFlow's is seeded if it is imported already.
    JAX has no global generator: give its models `seed`. `deterministic`: PyTorch uses deterministic algorithms from
    now on, and raises where an operation has none.
    """
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
        tensorflow.random.set_seed(seed)


def _module(name: str) -> Any:
    return importlib.import_module(name) if importlib.util.find_spec(name) else None
