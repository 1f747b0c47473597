"""Runs one call on one fuzzed input within limits of time and memory, and classifies the outcome.

An input passes if it is read, or refused by a ValueError or OSError that this library raises itself. Errors raised by
Python or another package, MemoryError and RecursionError included, are failures.
"""

from __future__ import annotations

import contextlib
import linecache
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import monoblock

PACKAGE = Path(monoblock.__file__).parent
# Limits for one input: processor time, which does not depend on the machine's load, and memory in addition to its size.
SECONDS, MEMORY = 10, 1 << 30


class TooSlow(BaseException):
    """The time limit is exceeded. A BaseException, so that readers do not catch it."""


@dataclass(frozen=True)
class Outcome:
    """`kind`: "read", "refused" or "failed"; `what`: the error."""

    kind: str
    what: str
    seconds: float


def deliberate(error: BaseException, kinds: tuple[type[Exception], ...] = (ValueError, OSError)) -> bool:
    """Whether the error was raised by a `raise` statement of this library."""
    if not isinstance(error, kinds):
        return False
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return False
    frame, line = frames[-1]
    name = frame.f_code.co_filename
    return Path(name).is_relative_to(PACKAGE) and linecache.getline(name, line).strip().startswith("raise ")


@contextlib.contextmanager
def limits(seconds: float, memory: int) -> Generator[None]:
    """Raises TooSlow or MemoryError when a limit is exceeded. The time is limited in the main thread only."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    timed = threading.current_thread() is threading.main_thread()

    def stop(*_: Any) -> None:
        raise TooSlow(f"it took over {seconds} s")

    previous = signal.signal(signal.SIGPROF, stop) if timed else None
    try:
        if timed:
            signal.setitimer(signal.ITIMER_PROF, seconds)
        if sys.platform == "linux":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if timed:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, previous)


def attempt(
    read: Callable[[], Any], *, size: int = 0, seconds: float = SECONDS, memory: int = MEMORY
) -> Outcome:
    """Calls `read` for an input of `size` bytes."""
    start = time.process_time()
    try:
        with limits(seconds, memory + size):
            read()
        kind, what = "read", ""
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        kind = "refused" if deliberate(error) else "failed"
        message = " ".join(str(error).split())[:300]
        what = f"{type(error).__name__}: {message} ({Path(frame.filename).name}:{frame.lineno})"
    return Outcome(kind, what, time.process_time() - start)
