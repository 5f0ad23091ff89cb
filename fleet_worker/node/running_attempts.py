"""The attempts that run at a node: since when, how each is cancelled, and which must not begin."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fleet_worker.errors import Cancelled, FleetError
from fleet_worker.mlx.timeouts import CancelToken

REMEMBERED = 10_000
"""The number of delivered attempts, and of cancelled requests, that a node remembers: the last ones."""


class RunningAttempts:
    """Safe for all threads. Times are those of `clock`, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._running: dict[tuple[str, int], tuple[CancelToken, str]] = {}
        self._delivered: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._cancelled: OrderedDict[str, int] = OrderedDict()
        """The last cancelled attempt of each request."""
        self.refusal: Callable[[], FleetError] | None = None
        """Makes the error that each attempt gets which begins now; None while they may begin."""
        self.changed: Callable[[], None] = lambda: None
        """Is called when the first attempt has begun, and when the last has ended. It must not wait."""
        self.busy_since: float | None = None
        """The time since which at least one attempt has been running without a break; None while none runs."""

    def __len__(self) -> int:
        return len(self._running)

    @property
    def routers(self) -> set[str]:
        """The reply queues of the routers that an attempt runs for."""
        with self._lock:
            return {reply_to for _, reply_to in self._running.values()}

    def is_new(self, request_id: str, attempt: int) -> bool:
        """Return True once for each attempt: a broker may deliver a message twice."""
        key = (request_id, attempt)
        with self._lock:
            if key in self._delivered:
                return False
            _remember(self._delivered, key, None)
            return True

    @contextmanager
    def attempt(self, request_id: str, attempt: int, reply_to: str) -> Iterator[CancelToken]:
        """Within this block the attempt runs for the router of `reply_to`, and can be cancelled.

        Raises:
            Cancelled: the request was cancelled before this attempt began.
            FleetError: none may begin now.
        """
        key, cancel_token = (request_id, attempt), CancelToken()
        with self._lock:
            if attempt <= self._cancelled.get(request_id, 0):
                raise Cancelled("the request was cancelled before it began")
            if self.refusal:
                raise self.refusal()
            self._running[key] = cancel_token, reply_to
            self.busy_since = self.busy_since or self._clock()
            is_first = len(self._running) == 1
        if is_first:
            self.changed()
        try:
            yield cancel_token
        finally:
            with self._lock:
                del self._running[key]
                if is_last := not self._running:
                    self.busy_since = None
            if is_last:
                self.changed()

    def cancel(self, request_id: str, attempt: int) -> None:
        """Cancel all attempts at this request up to the given one, those that have not begun as well."""
        with self._lock:
            _remember(self._cancelled, request_id, max(attempt, self._cancelled.get(request_id, 0)))
            tokens = [
                token for (its_id, its), (token, _) in self._running.items() if its_id == request_id and its <= attempt
            ]
        for token in tokens:
            token.cancel(Cancelled())

    def stop(self, error: Callable[[], FleetError], *, reply_to: str | None = None) -> int:
        """End all attempts, or all for one router, each with its own `error()`; return their number."""
        with self._lock:
            tokens = [token for token, its in self._running.values() if reply_to in (None, its) and token.error is None]
        for token in tokens:
            token.cancel(error())
        return len(tokens)


def _remember(memory: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    """Add it as the newest, and forget the oldest if there are too many."""
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > REMEMBERED:
        memory.popitem(last=False)
