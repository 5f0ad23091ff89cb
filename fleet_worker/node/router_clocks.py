"""How long requests have waited, by the clocks of their routers: the clock of no other host is compared with ours."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from fleet_worker.protocol import clock
from fleet_worker.protocol.request import FleetRequest

ASKED_AGAIN_AFTER = 300.0
"""Seconds after which a router is asked again what its clock shows: two clocks drift apart, by 10 ms in that time."""
REMEMBERED = 1_000
"""Routers: the last ones that told the time."""


class RouterClocks:
    """The difference between our clock and that of each router. Safe for all threads.

    A router tells its time in control messages, which wait in no lane. One that arrives late makes its requests look
    younger, never older; the next request that has not waited corrects that. So at worst a node begins a request that
    has expired, until its router cancels it.
    """

    def __init__(self, now: Callable[[], float] = clock.now) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._routers: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """By reply queue: our clock minus that of the router, and the time.monotonic() when it was told."""

    def told(self, reply_to: str, sent_at: float) -> None:
        """The clock of this router has just shown `sent_at`."""
        with self._lock:
            self._routers[reply_to] = self._now() - sent_at, time.monotonic()
            self._routers.move_to_end(reply_to)
            if len(self._routers) > REMEMBERED:
                self._routers.popitem(last=False)

    def age(self, request: FleetRequest) -> float | None:
        """Return the seconds since the caller submitted this request; None if the clock of its router is not known."""
        with self._lock:
            if request.reply_to not in self._routers:
                return None
            ahead, told_at = self._routers[request.reply_to]
            seemingly = self._now() - request.submitted_at
            if seemingly < ahead:  # it cannot come from the future: the message that told the time was late
                self._routers[request.reply_to] = seemingly, told_at
            return max(0.0, seemingly - ahead)

    def is_to_ask(self, reply_to: str) -> bool:
        """Return whether this router should tell its time."""
        _, told_at = self._routers.get(reply_to, (0.0, float("-inf")))
        return time.monotonic() - told_at > ASKED_AGAIN_AFTER
