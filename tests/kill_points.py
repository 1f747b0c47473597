"""Crash injection: kills a save before its n-th file operation.

`killed` forks a process that is killed by SIGKILL before its n-th operation. `interrupted` needs no new process, for
frameworks that do not survive a fork: the n-th operation and all later ones raise `Killed`.
"""

from __future__ import annotations

import atexit
import errno
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from monoblock.checkpoint import save, transaction

# `make fuzz` kills at every operation, `make test` at a sample of them.
ALL = bool(os.environ.get("MONOBLOCK_TEST_ALL_KILL_POINTS"))

Act = Callable[[str], None]

_tried = [0]
if ALL:
    atexit.register(lambda: print(f"kill points tried: {_tried[0]}"))

_CHANGES = {
    *("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown"),
    *("os.truncate", "os.utime", "os.setxattr", "fcntl.flock"),
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_active: list[Act] = []
_installed: list[bool] = []


class Killed(BaseException):
    """Stands for SIGKILL within the process."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _active:
        return
    if event in _CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES):
        _active[-1](event)


def _before(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        if _active:
            _active[-1](name)
        return function(*arguments, **keywords)

    return call


@contextmanager
def intercepted(act: Act) -> Generator[None, None, None]:
    """Calls `act` before each operation that changes files or syncs them to disk."""
    if not _installed:
        sys.addaudithook(_audit)  # audit hooks cannot be removed
        _installed.append(True)
    with (
        mock.patch.object(os, "fsync", _before("fsync", os.fsync)),
        mock.patch.object(transaction, "exchange", _before("exchange", transaction.exchange)),
        mock.patch.object(save, "write_bytes", _before("write", save.write_bytes)),
    ):
        _active.append(act)
        try:
            yield
        finally:
            _active.pop()


def operations(do: Callable[[], object]) -> list[str]:
    """The names of a call's file operations, in order."""
    found: list[str] = []
    with intercepted(found.append):
        do()
    return found


def spread(count: int, most: int) -> list[int]:
    """At most `most` evenly spaced integers from 0 to `count` inclusive; all of them with `ALL`."""
    steps = count if ALL else min(most - 1, count)
    return sorted({round(i * count / steps) for i in range(steps + 1)})


def killed(do: Callable[[], object], at: int) -> bool:
    """Runs `do` in a fork that is killed before operation `at` (from 0). False if it finished before that."""
    _tried[0] += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later: fork with threads
        process = os.fork()
    if not process:
        status = 1
        try:
            left = [at]

            def act(_: str) -> None:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            with intercepted(act):
                do()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def interrupted(do: Callable[[], object], at: int) -> bool:
    """Like `killed`, in this process."""
    _tried[0] += 1
    left = [at]

    def act(_: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    try:
        with intercepted(act):
            do()
    except Killed:
        return True
    return False


@contextmanager
def failing(at: int, code: int = errno.ENOSPC) -> Generator[None, None, None]:
    """Operation `at` raises OSError, by default that of a full disk."""
    left = [at]

    def act(event: str) -> None:
        left[0] -= 1
        if left[0] == -1 and event != "fcntl.flock":
            raise OSError(code, os.strerror(code))

    with intercepted(act):
        yield
