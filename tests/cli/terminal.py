"""Runs a program in a pseudo-terminal: reads its output and types input."""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
import sys
import termios
import time
from collections.abc import Sequence

CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """Runs `python ARGS` with a terminal as stdin, stdout and stderr; `output` is its unread output."""

    def __init__(self, args: Sequence[str], env: dict[str, str] | None = None) -> None:
        self.output = ""
        self.screen, terminal = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *args],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=os.environ | {"TERM": "dumb"} | (env or {}),
            start_new_session=True,
            # The controlling terminal, so that Ctrl-C becomes SIGINT.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(terminal)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.screen)

    def type(self, text: str) -> None:
        """Sends keys."""
        os.write(self.screen, text.encode())

    def interrupt_prompt(self) -> None:
        """Ctrl-C at a prompt. Waits, since readline misses signals between printing a prompt and reading."""
        time.sleep(0.3)
        self.type(CTRL_C)

    def expect(self, text: str, seconds: float = 20) -> str:
        """Waits for `text`; returns the output before it."""
        deadline = time.monotonic() + seconds
        while text not in self.output:
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"waited for {text!r}, got {self.output!r}")
        before, _, self.output = self.output.partition(text)
        return before

    def end(self, seconds: float = 20) -> int:
        """Waits until the program exits; returns its exit code."""
        deadline = time.monotonic() + seconds
        while self._read(deadline - time.monotonic()):
            pass
        return self.process.wait(max(deadline - time.monotonic(), 0.1))

    def _read(self, seconds: float) -> bool:
        if not select.select([self.screen], [], [], max(seconds, 0))[0]:
            return False
        try:
            data = os.read(self.screen, 4096)
        except OSError:  # the program ended
            return False
        self.output += data.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)
