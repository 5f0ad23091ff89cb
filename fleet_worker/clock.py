"""The clocks of one request to an MLX server: connect, first content, gap, and the deadline above them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from fleet_worker.errors import RequestTimeout
from fleet_worker.settings import Clocks
from fleet_worker.watchdog import Guard, Watchdog

__all__ = ["Clock"]


class Clock:
    """The time of one request, as one limit that the watchdog enforces. Moments are monotonic seconds.

    Raises:
        RequestTimeout: the deadline has passed already.
    """

    def __init__(self, watchdog: Watchdog, limits: Clocks, deadline: float) -> None:
        self.started = time.monotonic()
        if self.started >= deadline:
            raise RequestTimeout("the deadline passed before the MLX server was asked")
        self.connecting = min(limits.connect, deadline - self.started)
        """Seconds that connecting may take in all."""
        self._watchdog = watchdog
        self._gap = limits.gap
        self._deadline = deadline
        self._silent_until = min(deadline, self.started + limits.first_content)
        self._flowing = False
        self._guard = Guard(None, deadline)

    def timeouts(self) -> dict[str, float | None]:
        """What httpx may take from now until the head of the response; from there on the watchdog knows better."""
        now = time.monotonic()
        connect = max(0.001, self.started + self.connecting - now)
        return httpx.Timeout(max(0.001, self._silent_until - now), connect=connect).as_dict()

    @contextmanager
    def watching(self, response: httpx.Response) -> Iterator[None]:
        """Cut the connection of this response when its time is over."""
        stream = response.extensions.get("network_stream")
        connection = stream and stream.get_extra_info("socket")
        with self._watchdog.guard(connection, self._silent_until) as self._guard:
            yield

    def content(self) -> float:
        """Content arrived: return the moment. Its reader may take its time with it, up to the deadline."""
        now = self._watchdog.last_content = time.monotonic()
        self._guard.busy_until = self._deadline
        if not self._flowing:
            self._flowing = True
            self._watchdog.hasten(self._guard, min(self._deadline, now + self._gap))
        return now

    def waiting(self) -> None:
        """The server has the word again. Before the first content its time goes on as it began.

        Raises:
            RequestTimeout: the deadline passed while the reader was busy; what is still buffered comes too late.
        """
        if self._guard.cut:
            raise self.expired()
        if self._flowing:
            self._guard.limit = min(self._deadline, time.monotonic() + self._gap)
            self._guard.busy_until = 0.0

    def ending(self, seconds: float) -> None:
        """All that matters has arrived: the rest may take this long."""
        self._watchdog.hasten(self._guard, min(self._deadline, time.monotonic() + seconds))
        self._guard.busy_until = 0.0

    @property
    def cut(self) -> bool:
        """Has the connection been cut because its time was over?"""
        return self._guard.cut

    def expired(self) -> RequestTimeout:
        """Say whose time was over. Only a request that nothing came of may be tried elsewhere."""
        if time.monotonic() >= self._deadline:
            return RequestTimeout("the deadline passed while the MLX server was answering")
        if self._flowing:
            return RequestTimeout(f"the MLX server fell silent in mid-answer for {self._gap:g} s (clocks.gap)")
        return RequestTimeout("the MLX server sent no content in time (clocks.first_content)", retryable=True)
