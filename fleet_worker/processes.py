"""Child processes that are watched by their output and always ended."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

__all__ = ["ChildFailed", "ChildProcess", "child", "python"]

KEPT_LINES = 5_000


class ChildFailed(Exception):
    """A child process ended, or did not say what it was waited for."""


def python(*arguments: str) -> list[str]:
    """The command line of this interpreter with these arguments."""
    return [sys.executable, *arguments]


class ChildProcess:
    """A running child, in a process group of its own, so that a Ctrl-C is for its parent to handle."""

    def __init__(self, name: str, command: Sequence[str], env: dict[str, str] | None = None) -> None:
        self.name = name
        self.lines: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        """What it printed, on either stream; the last lines if it is much."""
        self._printed = threading.Condition()
        self._silent = False
        self._process = subprocess.Popen(  # noqa: S603 - our own command lines
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"output of {name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, says: Callable[[str], bool] | str, timeout: float) -> str:
        """Return the first line that contains `says`, or for which it is true.

        Raises:
            ChildFailed: the child ended first, or `timeout` seconds passed.
        """
        matches = says if callable(says) else lambda line: says in line
        deadline = time.monotonic() + timeout
        with self._printed:
            while True:
                for line in self.lines:
                    if matches(line):
                        return line
                if self._silent:
                    raise ChildFailed(f"{self.name} ended with exit code {self.wait(5)}:\n{self._tail()}")
                if not self._printed.wait(deadline - time.monotonic()):
                    raise ChildFailed(f"{self.name} was not ready within {timeout:g} s:\n{self._tail()}")

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def wait(self, timeout: float) -> int:
        """Return its exit code; raises `subprocess.TimeoutExpired`."""
        return self._process.wait(timeout)

    def stop(self, grace: float = 15.0) -> int:
        """End it with SIGTERM, and with SIGKILL if it takes longer than `grace` seconds; return its exit code."""
        if self._process.poll() is None:
            self.signal(signal.SIGTERM)
            self.signal(signal.SIGCONT)  # a frozen process does not hear the other
            try:
                self._process.wait(grace)
            except subprocess.TimeoutExpired:
                self._process.kill()
        code = self._process.wait(10)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._reader.join(5)
        if self._process.stdout:
            self._process.stdout.close()
        return code

    def _read(self) -> None:
        for line in self._process.stdout or ():
            with self._printed:
                self.lines.append(line)
                self._printed.notify_all()
        with self._printed:
            self._silent = True
            self._printed.notify_all()

    def _tail(self) -> str:
        return "".join(list(self.lines)[-12:]) or "(it printed nothing)"


@contextmanager
def child(name: str, command: Sequence[str], env: dict[str, str] | None = None) -> Iterator[ChildProcess]:
    """Run a child for the time of a block."""
    process = ChildProcess(name, command, env)
    try:
        yield process
    finally:
        process.stop()
