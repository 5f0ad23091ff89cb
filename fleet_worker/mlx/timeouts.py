"""Cuts the connection of a request whose clock has run out, or which is stopped."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fleet_worker.errors import FleetError, RequestTimeout
from fleet_worker.settings import ServerTimeouts

_LOOKS_AGAIN = 0.1
"""Seconds between two looks at a reader that has been busy for longer than its limit: nobody says when it is back."""

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing drops the connection. Otherwise the server's next write, a whole step of a prefill later, would
still succeed, and only the one after that tell the server that nobody listens."""


class CancelToken:
    """One for each request. Who works on it looks at `error`, and says meanwhile how its waiting can be cut short."""

    def __init__(self) -> None:
        self.error: FleetError | None = None
        """Why it was stopped; None while it was not."""
        self._lock = threading.Lock()
        self._cuts: list[Callable[[], object]] = []

    def cancel(self, error: FleetError) -> None:
        """Stop it, from any thread; only the first reason counts."""
        with self._lock:
            if self.error is None:
                self.error = error
                for cut in self._cuts:
                    cut()

    @contextmanager
    def on_cancel(self, cut: Callable[[], object]) -> Iterator[None]:
        """Within this block `cut` is what ends a wait: called once, in the thread of whoever stops. It must
        not block. There may be blocks within blocks, for what is waited for in turn.

        Raises:
            FleetError: it has been stopped before the block began; `cut` is not called then.
        """
        with self._lock:
            if self.error is not None:
                raise self.error
            self._cuts.append(cut)
        try:
            yield
        finally:
            with self._lock:
                self._cuts.remove(cut)


class ConnectionGuard:
    """One request under watch. Its reader moves `limit` (monotonic seconds) as it makes progress."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.busy_until = 0.0
        """Set while the reader is busy elsewhere: until then the limit does not count. It moves the limit first."""
        self.over = threading.Event()
        """Set once it was cut."""
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None

    def watch(self, connection: socket.socket) -> None:
        """This is the connection that it waits on from now. It may be closed, and wrapped in TLS, at any moment."""
        with self._lock:
            self._let_go()
            self._connection = connection.dup()
            if self.over.is_set():
                self._shut()

    def cut(self) -> None:
        """End the connection now, and one that comes later at once; whoever waits on it returns. From any thread."""
        with self._lock:
            self.over.set()
            self._shut()

    def close(self) -> None:
        with self._lock:
            self._let_go()

    def _shut(self) -> None:
        with contextlib.suppress(OSError):  # it is not connected any more
            if self._connection:
                self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                self._connection.shutdown(socket.SHUT_RDWR)

    def _let_go(self) -> None:
        if self._connection:
            self._connection.close()
        self._connection = None

    def due(self, now: float) -> float:
        """When to cut, or to look again."""
        busy_until = self.busy_until  # read before the limit, or the old one might count
        if not busy_until or self.limit > now:
            return self.limit
        return min(busy_until, now + _LOOKS_AGAIN)


class TimeoutThread:
    """One thread for all requests of a node.

    A thread that waits in `recv` cannot look at a clock, and httpx fixes its timeouts for a whole response. So the
    wait is ended from outside: `shutdown` of the socket makes `recv` return at once, on Linux and macOS.
    The thread sleeps until the earliest limit it knows; a limit that moves on costs its reader one assignment.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._guards: set[ConnectionGuard] = set()
        self._wakes_at = float("inf")
        self._closed = False
        self.last_content = 0.0
        """When content last arrived on any of them."""
        self._thread = threading.Thread(target=self._run, name="fleet-watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def watching(self, guard: ConnectionGuard) -> Iterator[None]:
        """Cut this one, within the block, when its limit has passed."""
        with self._changed:
            self._guards.add(guard)
        self.hasten(guard, guard.limit)
        try:
            yield
        finally:
            with self._changed:
                self._guards.discard(guard)
            guard.close()

    def hasten(self, guard: ConnectionGuard, limit: float) -> None:
        """Set a limit that may be earlier than before. (A later one is set by assignment.)"""
        guard.limit = limit
        with self._changed:
            if limit < self._wakes_at:
                self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                self._wakes_at = float("inf")
                for guard in self._guards:
                    if guard.over.is_set():
                        continue
                    if (due := guard.due(now)) <= now:
                        guard.cut()
                    else:
                        self._wakes_at = min(self._wakes_at, due)
                self._changed.wait(None if self._wakes_at == float("inf") else max(0.0, self._wakes_at - now))


class RequestTimer:
    """The time of one request, as one limit that the watchdog enforces. Moments are monotonic seconds."""

    def __init__(
        self, watchdog: TimeoutThread, limits: ServerTimeouts, deadline: float, cancel_token: CancelToken | None = None
    ) -> None:
        self.started = time.monotonic()
        self.connecting = min(limits.connect, deadline - self.started)
        """Seconds that connecting may take in all, however often it is tried."""
        self.guard = ConnectionGuard(min(deadline, self.started + limits.first_content))
        self._watchdog = watchdog
        self._cancel_token = cancel_token or CancelToken()
        self._gap = limits.gap
        self._deadline = deadline
        self._flowing = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """The request, from before it is connected to its end.

        Raises:
            FleetError: it was stopped before, or (`RequestTimeout`) the deadline has passed already.
        """
        with self._watchdog.watching(self.guard), self._cancel_token.on_cancel(self.guard.cut):
            if self.started >= self._deadline:
                raise RequestTimeout("the deadline passed before the MLX server was asked")
            yield

    @property
    def connect_timeout(self) -> float:
        """Seconds that are left for connecting."""
        return max(0.001, self.started + self.connecting - time.monotonic())

    def content(self) -> float:
        """Content arrived: return the moment. Its reader may take its time with it, up to the deadline."""
        now = self._watchdog.last_content = time.monotonic()
        self.guard.busy_until = self._deadline
        if not self._flowing:
            self._flowing = True
            self._watchdog.hasten(self.guard, min(self._deadline, now + self._gap))
        return now

    def waiting(self) -> None:
        """The server has the word again. Before the first content its time goes on as it began.

        Raises:
            FleetError: it was stopped, or the deadline passed, while the reader was busy; what is still buffered comes
                too late.
        """
        self.check()
        if self._flowing:
            self.guard.limit = min(self._deadline, time.monotonic() + self._gap)
            self.guard.busy_until = 0.0

    def ending(self, seconds: float) -> None:
        """All that matters has arrived: the rest may take this long."""
        self._watchdog.hasten(self.guard, min(self._deadline, time.monotonic() + seconds))
        self.guard.busy_until = 0.0

    @property
    def stopped(self) -> FleetError | None:
        """Why it was stopped from outside, if it was."""
        return self._cancel_token.error

    @property
    def over(self) -> FleetError | None:
        """Why the connection was cut, if it was: a cut may look like a failure, or like the end of a response."""
        return self.stopped or (self._expired() if self.guard.over.is_set() else None)

    def check(self) -> None:
        """Raise why the connection was cut, if it was."""
        if reason := self.over:
            raise reason

    def _expired(self) -> RequestTimeout:
        """Say whose time was over. If it was the server's, another one may do better."""
        if time.monotonic() >= self._deadline:
            return RequestTimeout("the deadline passed while the MLX server was answering")
        if self._flowing:
            return RequestTimeout(
                f"the MLX server fell silent in mid-answer for {self._gap:g} s (clocks.gap)", retryable=True
            )
        return RequestTimeout("the MLX server sent no content in time (clocks.first_content)", retryable=True)
