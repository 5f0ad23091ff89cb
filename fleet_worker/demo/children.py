"""The child processes of the demo, which need each other and end together."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType
from typing import Any, Self, TypeVar

from fleet_worker.host.child_process import ChildProcess, child

T = TypeVar("T")


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
