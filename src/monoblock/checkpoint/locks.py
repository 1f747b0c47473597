"""One writer at a time in a folder, among all threads and processes."""

import errno
import importlib
import logging
import os
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

log = logging.getLogger("monoblock")

LOCK = ".monoblock-lock"

_PAUSE = 0.005  # seconds between two tries
_LONG = 10.0  # seconds after which a message says what is waited for
_BUSY = {
    errno.EACCES,
    errno.EAGAIN,
    errno.EDEADLK,
}  # another one holds the lock, as Linux, macOS and Windows say it


@contextmanager
def locked(folder: Path) -> Generator[None, None, None]:
    """Holds the lock of a folder; waits as long as another thread or process does. OSError: it cannot be written to.

    The lock is on a file of the folder that is there only meanwhile. It ends with the process that holds it, even if
    that is killed. Where a file system has no locks, there is none.
    """
    path = folder / LOCK
    start, told = time.monotonic(), False
    while (descriptor := _try(path)) is None:
        if not told and time.monotonic() - start > _LONG:
            log.warning("waiting for another save into %s to end", folder)
            told = True
        time.sleep(_PAUSE)
    try:
        yield
    finally:
        try:
            with suppress(OSError):
                path.unlink()  # while it is held: a later one would be another's
        finally:
            os.close(descriptor)
        if os.name == "nt":  # there an open file cannot be unlinked, another's included
            with suppress(OSError):
                path.unlink()


def _try(path: Path) -> int | None:
    """The descriptor of the locked file; None if another one holds it, or removed it just now."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except PermissionError:
        if not path.exists():
            raise
        if os.name == "nt":
            return None  # its holder is about to remove it
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)  # another user's
    try:
        if _take(descriptor) and _names(path, descriptor):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _take(descriptor: int) -> bool:
    try:
        if os.name == "nt":
            windows: Any = importlib.import_module("msvcrt")
            windows.locking(descriptor, windows.LK_NBLCK, 1)
        else:
            posix: Any = importlib.import_module("fcntl")
            posix.flock(descriptor, posix.LOCK_EX | posix.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        log.debug("no file locks here (%s)", error)
    return True


def _names(path: Path, descriptor: int) -> bool:
    """Whether the file that is held is still the one of that name: its last holder removed it."""
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(descriptor))
    return False
