"""Fine-tuning: data, tasks, the loop, checkpoints and metrics; the computation is in the backend."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monoblock.training.options import TrainingOptions
    from monoblock.training.trainer import Trainer, TrainingResult, evaluate_file

_HOME = {
    "Trainer": "trainer",
    "TrainingOptions": "options",
    "TrainingResult": "trainer",
    "evaluate_file": "trainer",
}

__all__ = ["Trainer", "TrainingOptions", "TrainingResult", "evaluate_file"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
