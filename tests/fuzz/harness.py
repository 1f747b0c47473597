"""One attempt to read one hostile input: how it ends, within which time and memory.

It ends well if the input is read, or refused with an error that this library raises itself, a ValueError or an OSError.
Whatever Python or another package raises first, a MemoryError and a RecursionError among it, is a failure.
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
# For one input: seconds of the processor, so that other work on the machine does not count, and memory beside its size.
SECONDS, MEMORY = 10, 1 << 30


class TooSlow(BaseException):
    """An input took longer than it may; a BaseException, so that nothing takes it for a fault of the file."""


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: "read", "refused" or "failed", with the error in words."""

    kind: str
    what: str
    seconds: float


def deliberate(error: BaseException, kinds: tuple[type[Exception], ...] = (ValueError, OSError)) -> bool:
    """Whether the library has raised this error itself, for a file, or a call, that is at fault."""
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
    """TooSlow and MemoryError where one is passed. In the main thread alone is the time watched."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    watched = threading.current_thread() is threading.main_thread()

    def stop(*_: Any) -> None:
        raise TooSlow(f"it took over {seconds} s")

    previous = signal.signal(signal.SIGPROF, stop) if watched else None
    try:
        if watched:
            signal.setitimer(signal.ITIMER_PROF, seconds)
        if sys.platform == "linux":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if watched:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, previous)


def attempt(
    read: Callable[[], Any], *, size: int = 0, seconds: float = SECONDS, memory: int = MEMORY
) -> Outcome:
    """Read an input of so many bytes."""
    start = time.process_time()
    try:
        with limits(seconds, memory + size):
            read()
        kind, what = "read", ""
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        kind = "refused" if deliberate(error) else "failed"
        words = " ".join(str(error).split())[:300]
        what = f"{type(error).__name__}: {words} ({Path(place.filename).name}:{place.lineno})"
    return Outcome(kind, what, time.process_time() - start)
