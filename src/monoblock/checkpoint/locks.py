"""Advisory locks on a folder or a file: one writer at a time, across threads and processes."""

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

_PAUSE = 0.005  # seconds between attempts
_LONG = 10.0  # seconds of waiting after which a warning is logged
# Error codes of Linux, macOS and Windows for a lock that is held.
_BUSY = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}


@contextmanager
def locked(folder: Path) -> Generator[None, None, None]:
    """Hold the lock of a folder; waits while another thread or process holds it. OSError: the folder is not writable.

    The lock is flock (or msvcrt.locking) on a temporary file in the folder, so the system releases it when its process
    ends, even if killed. On file systems without locks, nothing is locked.
    """
    path = folder / LOCK
    start, warned = time.monotonic(), False
    while (descriptor := _try(path)) is None:
        if not warned and time.monotonic() - start > _LONG:
            log.warning("waiting for another save into %s to end", folder)
            warned = True
        time.sleep(_PAUSE)
    with _held(path, descriptor):
        yield


@contextmanager
def exclusive(path: Path) -> Generator[None, None, None]:
    """Hold the lock file `path`; BlockingIOError if another process holds it. The file is removed at the end."""
    if (descriptor := _try(path)) is None:
        raise BlockingIOError(f"another process holds {path}: wait until it ends, or stop it")
    with _held(path, descriptor):
        yield


@contextmanager
def _held(path: Path, descriptor: int) -> Generator[None, None, None]:
    """Release a lock at the end of the block."""
    try:
        yield
    finally:
        try:
            with suppress(OSError):
                path.unlink()  # while it is held, so that no other process's lock file is removed
        finally:
            os.close(descriptor)
        if os.name == "nt":  # an open file cannot be unlinked there, nor one that a waiting process has open
            with suppress(OSError):
                path.unlink()


def _try(path: Path) -> int | None:
    """The descriptor of the locked file; None if another holder has locked or just removed it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except PermissionError:
        if not path.exists():
            raise
        if os.name == "nt":
            return None  # the holder is removing it
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)  # owned by another user
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
        log.debug("the file system has no locks (%s)", error)
    return True


def _names(path: Path, descriptor: int) -> bool:
    """Whether `path` still names the open file: a previous holder may have removed it."""
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(descriptor))
    return False
