"""Runs a fine-tuning again and again in processes that are killed at random times, until it is done.

    python training_kills.py OPTIONS.json KILLS SEED

Each process is a fork of this one, which has imported PyTorch and computed nothing. Prints the number of processes that
were killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

import monoblock.backends.pytorch.training.learner  # noqa: F401  # imported once, before the forks
from monoblock.training import Trainer, TrainingOptions


def attempt(options: dict[str, Any], delay: float | None) -> bool:
    """Whether a process ended the run; killed after `delay` seconds of training."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)

        def kill() -> None:
            time.sleep(delay or 0)
            os.kill(os.getpid(), signal.SIGKILL)

        if delay is not None:
            threading.Thread(target=kill, daemon=True).start()
        Trainer(TrainingOptions(**options)).train(resume=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status:
        raise SystemExit(f"a run failed with {status}")
    return True


def main() -> None:
    options = json.loads(Path(sys.argv[1]).read_text())
    rng = random.Random(int(sys.argv[3]))
    killed = 0
    while killed < int(sys.argv[2]) and not attempt(options, rng.uniform(0.05, 0.8)):
        killed += 1
    if killed == int(sys.argv[2]):
        assert attempt(options, None)
    print(killed)


if __name__ == "__main__":
    main()
