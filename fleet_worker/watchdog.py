"""Cuts a connection whose clock has run out."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Guard", "Watchdog"]


_LOOKS_AGAIN = 0.1
"""Seconds between two looks at a reader that has been busy for longer than its limit: nobody says when it is back."""


class Guard:
    """One connection under watch. Its reader moves `limit` (monotonic seconds) as it makes progress."""

    def __init__(self, connection: socket.socket | None, limit: float) -> None:
        self._connection = connection
        self.limit = limit
        self.busy_until = 0.0
        """Set while the reader is busy elsewhere: until then the limit does not count. It moves the limit first."""
        self.cut = False
        """True once the connection was cut because the limit had passed."""

    def _due(self, now: float) -> float:
        """When to cut, or to look again."""
        busy_until = self.busy_until  # read before the limit, or the old one might count
        if not busy_until or self.limit > now:
            return self.limit
        return min(busy_until, now + _LOOKS_AGAIN)

    def _cut(self) -> None:
        self.cut = True
        with contextlib.suppress(OSError):  # closed meanwhile
            if self._connection:
                self._connection.shutdown(socket.SHUT_RDWR)


class Watchdog:
    """One thread for all connections of a node.

    A thread that waits in `recv` cannot look at a clock, and httpx fixes a read timeout for a whole response. So the
    wait is ended from outside: `shutdown` of the socket makes `recv` return at once, on Linux and macOS.
    The thread sleeps until the earliest limit it knows; a limit that moves on costs its reader one assignment.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._guards: set[Guard] = set()
        self._wakes_at = float("inf")
        self._closed = False
        self.last_content = 0.0
        """When content last arrived on any of them."""
        self._thread = threading.Thread(target=self._run, name="fleet-watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def guard(self, connection: socket.socket | None, limit: float) -> Iterator[Guard]:
        guard = Guard(connection, limit)
        with self._changed:
            self._guards.add(guard)
        self.hasten(guard, limit)
        try:
            yield guard
        finally:
            with self._changed:
                self._guards.discard(guard)

    def hasten(self, guard: Guard, limit: float) -> None:
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
                    if not guard.cut and (due := guard._due(now)) <= now:
                        guard._cut()
                    elif not guard.cut:
                        self._wakes_at = min(self._wakes_at, due)
                self._changed.wait(None if self._wakes_at == float("inf") else max(0.0, self._wakes_at - now))
