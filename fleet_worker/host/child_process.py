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
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType
from typing import Any, Self, TypeVar

from fleet_worker.host.parent_pipe import OrphanKiller

KEPT_LINES = 5_000

T = TypeVar("T")


class ChildFailed(Exception):
    """A child process ended, or did not print what was waited for."""


class ChildLost(BaseException):
    """A child ended while others rely on it. Not an `Exception`: it can be raised between any two instructions."""

    def __init__(self, child: ChildProcess) -> None:
        self._child = child

    def __str__(self) -> str:
        return self._child.report_end()


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived; `exit_code` is the one of a program that a signal has ended."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


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


class Children:
    """Child processes that need each other and end together, with the block: `with Children() as children`.

    In the block SIGINT, SIGTERM and SIGHUP raise `Interrupted`, and a child that ends raises `ChildLost`, at whatever
    line the block is. At its end everything that was started and entered is stopped, the last one first, without
    interruption. For the main thread only, as all signal handling in Python.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._processes: list[ChildProcess] = []
        self._handlers: dict[int, Any] = {}
        self._deferring = False
        self._deferred: ChildLost | Interrupted | None = None

    def __enter__(self) -> Self:
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup, or in the background of a shell
                self._handlers[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._deferring = True
        self._deferred = None
        self._processes.clear()  # from here on they may end
        try:
            self._stack.close()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        if self._deferred and kind is None:
            raise self._deferred

    def start(self, name: str, command: Sequence[str], env: dict[str, str] | None = None) -> ChildProcess:
        with self._uninterrupted():  # or a process could run that is in no list yet
            process = self._stack.enter_context(child(name, command, env))
            self._processes.append(process)
        return process

    def enter(self, context: AbstractContextManager[T]) -> T:
        """Enter a context that is left before everything that was started or entered earlier."""
        with self._uninterrupted():
            return self._stack.enter_context(context)

    @contextmanager
    def _uninterrupted(self) -> Iterator[None]:
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
            if reason := self._deferred or self._reason(signal.SIGCHLD):  # a child may have ended before it was listed
                raise reason

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        reason = self._reason(number)
        if reason and not self._deferring:
            raise reason
        self._deferred = self._deferred or reason

    def _reason(self, number: int) -> ChildLost | Interrupted | None:
        if number != signal.SIGCHLD:
            return Interrupted(number)
        return next((ChildLost(each) for each in self._processes if each.ended), None)
