"""The attempts that run at a node, how each of them is stopped, and which ones must not begin."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fleet_worker.errors import Cancelled, FleetError
from fleet_worker.mlx.timeouts import CancelToken

REMEMBERED = 10_000
"""Cancelled requests that a node remembers, and for how many seconds: none waits in a lane for longer."""
REMEMBERED_FOR = 3600.0


class RunningAttempts:
    """Any thread may ask and stop. Moments are those of `clock`, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._stops: dict[tuple[str, int], tuple[CancelToken, str]] = {}
        self._cancelled: OrderedDict[str, tuple[int, float]] = OrderedDict()

    @contextmanager
    def attempt(self, request_id: str, attempt: int, reply_to: str) -> Iterator[CancelToken]:
        """Within this block the attempt runs for the router that `reply_to` belongs to, and may be stopped.

        Raises:
            Cancelled: nobody wants it any more; it has not begun.
        """
        key, stop = (request_id, attempt), CancelToken()
        with self._lock:
            if self._is_cancelled(request_id, attempt):
                raise Cancelled("the request was cancelled before it began")
            self._stops[key] = stop, reply_to
        try:
            yield stop
        finally:
            with self._lock:
                del self._stops[key]

    def cancel(self, request_id: str, attempt: int) -> None:
        """Nobody wants the attempts at this request up to that one: stop what runs, and never begin what does not."""
        with self._lock:
            self._remember(request_id, attempt)
            stops = [
                stop for (its_id, its), (stop, _) in self._stops.items() if its_id == request_id and its <= attempt
            ]
        for stop in stops:
            stop.cancel(Cancelled())

    def stop(self, error: Callable[[], FleetError], *, reply_to: str | None = None) -> int:
        """Stop all that runs, or all for one router, each with an `error` of its own; return how many it were."""
        with self._lock:
            stops = [stop for stop, its in self._stops.values() if reply_to in (None, its) and stop.error is None]
        for stop in stops:
            stop.cancel(error())
        return len(stops)

    @property
    def routers(self) -> set[str]:
        """The reply queues of those that something runs for."""
        with self._lock:
            return {reply_to for _, reply_to in self._stops.values()}

    def _is_cancelled(self, request_id: str, attempt: int) -> bool:
        last, since = self._cancelled.get(request_id, (0, 0.0))
        return attempt <= last and self._clock() - since < REMEMBERED_FOR

    def _remember(self, request_id: str, attempt: int) -> None:
        """The oldest are first; one that is cancelled again is new again."""
        now = self._clock()
        last, _ = self._cancelled.pop(request_id, (0, 0.0))
        self._cancelled[request_id] = max(last, attempt), now
        while len(self._cancelled) > REMEMBERED or now - next(iter(self._cancelled.values()))[1] >= REMEMBERED_FOR:
            self._cancelled.popitem(last=False)
