"""A program under a pseudo-terminal, for tests: what it prints, and what a user types."""

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
    """Runs `python ARGS` with a terminal as stdin, stdout and stderr; `seen` is what it printed."""

    def __init__(self, args: Sequence[str], env: dict[str, str] | None = None) -> None:
        self.seen = ""
        self.screen, theirs = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *args],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "dumb"} | (env or {}),
            start_new_session=True,
            # Its controlling terminal, so that Ctrl-C becomes a signal.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.screen)

    def type(self, text: str) -> None:
        """Keys, as a user presses them."""
        os.write(self.screen, text.encode())

    def interrupt_prompt(self) -> None:
        """Ctrl-C at a prompt. Between printing one and waiting for a key, readline can miss a signal; no user is that
        quick."""
        time.sleep(0.3)
        self.type(CTRL_C)

    def expect(self, text: str, seconds: float = 20) -> str:
        """Waits until `text` is printed; what came before it, since the last call."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"waited for {text!r}, saw {self.seen!r}")
        before, _, self.seen = self.seen.partition(text)
        return before

    def end(self, seconds: float = 20) -> int:
        """Waits until the program ends; its exit code."""
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
        self.seen += data.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)
