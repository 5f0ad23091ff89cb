"""Child processes whose output can be waited for, and that always end: with their block, and with their parent."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fleet_worker.host.parent_pipe import OrphanKiller

KEPT_LINES = 5_000


class ChildFailed(Exception):
    """A child process ended, or did not print what was waited for."""


def free_port() -> int:
    """Return a port of 127.0.0.1 that was free at the time of the call."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def python(*arguments: str) -> list[str]:
    """Return the command line of this interpreter with these arguments."""
    return [sys.executable, *arguments]


def how_ended(code: int | None) -> str:
    """Return a description of an exit code of `subprocess`."""
    return f"ended with exit code {code}" if code is None or code >= 0 else f"was killed by signal {-code}"


def terminate(process: subprocess.Popen[Any]) -> None:
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)  # a stopped process handles no SIGTERM


def kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it is empty; macOS says EPERM for zombies
        os.killpg(group, signal.SIGKILL)


class ChildProcess:
    """A running child in a process group of its own, so that Ctrl-C interrupts the parent only.

    Its whole group is killed when this process ends without `stop`.
    """

    def __init__(self, name: str, command: Sequence[str], env: dict[str, str] | None = None) -> None:
        self.name = name
        self.lines: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        """The last KEPT_LINES lines that it printed, on both streams."""
        self._printed = threading.Condition()
        self._output_ended = False
        self._orphan_killer = OrphanKiller()
        try:
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
        except BaseException:
            self._orphan_killer.close()
            raise
        self._orphan_killer.watch(self._process.pid)
        self._reader = threading.Thread(target=self._read, name=f"output of {name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, wanted: Callable[[str], bool] | str, timeout: float) -> str:
        """Return the first line that contains the text `wanted`, or for which the function returns true.

        Raises:
            ChildFailed: the child ended first, or `timeout` seconds passed.
        """
        matches = wanted if callable(wanted) else lambda line: wanted in line
        deadline = time.monotonic() + timeout
        with self._printed:
            while True:
                for line in self.lines:
                    if matches(line):
                        return line
                if self._output_ended:
                    self.wait(5)
                    raise ChildFailed(self.report_end())
                if not self._printed.wait(deadline - time.monotonic()):
                    raise ChildFailed(f"{self.name} was not ready within {timeout:g} s:\n{self._tail()}")

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def report_end(self) -> str:
        """Return how it ended, and its last lines."""
        code = self._process.poll()
        return f"{self.name} {how_ended(code)}:\n{self._tail().rstrip()}"

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout: float) -> int:
        """Return its exit code; raises `subprocess.TimeoutExpired`."""
        return self._process.wait(timeout)

    def stop(self, grace: float = 15.0) -> int:
        """End it by SIGTERM, after `grace` seconds by SIGKILL, then kill its group; return its exit code."""
        if self._process.poll() is None:
            terminate(self._process)
            try:
                self._process.wait(grace)
            except subprocess.TimeoutExpired:
                self._process.kill()
        code = self._process.wait(10)
        kill_group(self.pid)
        self._orphan_killer.close()
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
            self._output_ended = True
            self._printed.notify_all()

    def _tail(self) -> str:
        return "".join(list(self.lines)[-12:]) or "(it printed nothing)"


@contextmanager
def child(name: str, command: Sequence[str], env: dict[str, str] | None = None) -> Iterator[ChildProcess]:
    """Run a child until the end of a block."""
    process = ChildProcess(name, command, env)
    try:
        yield process
    finally:
        process.stop()
