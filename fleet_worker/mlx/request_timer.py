"""The clocks of one request to an MLX server: connect, first content, gap, and the deadline above them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fleet_worker.errors import FleetError, RequestTimeout
from fleet_worker.mlx.cancellation import Stop
from fleet_worker.mlx.timeouts import Guard, Watchdog
from fleet_worker.settings import Clocks

__all__ = ["Clock"]


class Clock:
    """The time of one request, as one limit that the watchdog enforces. Moments are monotonic seconds."""

    def __init__(self, watchdog: Watchdog, limits: Clocks, deadline: float, stop: Stop | None = None) -> None:
        self.started = time.monotonic()
        self.connecting = min(limits.connect, deadline - self.started)
        """Seconds that connecting may take in all, however often it is tried."""
        self.guard = Guard(min(deadline, self.started + limits.first_content))
        self._watchdog = watchdog
        self._stop = stop or Stop()
        self._gap = limits.gap
        self._deadline = deadline
        self._flowing = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """The request, from before it is connected to its end.

        Raises:
            FleetError: it was stopped before, or (`RequestTimeout`) the deadline has passed already.
        """
        with self._watchdog.watching(self.guard), self._stop.cutting(self.guard.cut):
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
        return self._stop.error

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
