"""What the one thread of `fleet-worker up` waits for: signals, sockets, calls of other threads, and a time."""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

LONGEST_WAIT = 86_400.0
"""Seconds: epoll takes no more than 24 days."""


class EventLoop:
    """Calls `on_signal` with SIGHUP, SIGTERM, SIGINT, and the data of each socket in `selector` that is ready, with its
    events. As a context it handles signals, in the main thread.

    Signals arrive through a file descriptor: the system may deliver one to any thread, and one that comes just before
    the wait must end it. SIGCHLD ends it too: one or several children have ended.
    """

    def __init__(self, on_signal: Callable[[int], None]) -> None:
        self.selector = selectors.DefaultSelector()
        self._on_signal = on_signal
        self._calls: deque[Callable[[], None]] = deque()
        self._reader, self._writer = socket.socketpair()

    def __enter__(self) -> Self:
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self.selector.register(self._reader, selectors.EVENT_READ, self._receive)
        self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        handled = [signal.SIGCHLD, signal.SIGHUP, signal.SIGTERM]  # SIGHUP under nohup too
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a shell
            handled.append(signal.SIGINT)
        # Python writes a signal to the file descriptor only if the signal has a handler in Python.
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in handled}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before)
        self.selector.close()
        self._reader.close()
        self._writer.close()

    def call(self, function: Callable[[], None]) -> None:
        """Have `wait` call it. For other threads."""
        self._calls.append(function)
        with contextlib.suppress(OSError):  # it is full, so the wait ends anyway; or closed
            self._writer.send(b"\0")

    def wait(self, due: float) -> None:
        """Wait until something happens, or until this time.monotonic(); do what has happened."""
        timeout = min(LONGEST_WAIT, max(0.0, due - time.monotonic()))
        for key, events in self.selector.select(timeout):
            key.data(events)
        while self._calls:
            self._calls.popleft()()

    def _receive(self, _events: int) -> None:
        for number in self._reader.recv(4096):
            if number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
                self._on_signal(number)
