"""Which requests a node must not begin before their router has confirmed that it still wants them.

A node hears no cancels while it is not connected. So it may take a request out of a lane that was cancelled, or whose
deadline passed, hours ago. It asks with its `Accepted` frame; the router answers with a confirmation or a cancel.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fleet_worker.mlx.timeouts import CancelToken

ANSWER_WITHIN = 2.0
"""Seconds that a router has for its answer. A router of an older version gives none."""


class Confirmations:
    """Safe for all threads."""

    def __init__(self) -> None:
        self.hears_since: float | None = None
        """time.monotonic() since when cancels reach this node; None while they do not, and no confirmations either."""
        self._asked: dict[tuple[str, int], threading.Event] = {}

    def connected(self, connected: bool) -> None:
        """Cancels reach this node from now on, or do not any more."""
        self.hears_since = (self.hears_since or time.monotonic()) if connected else None

    def may_be_cancelled(self, age: float) -> bool:
        """Return whether a request that was submitted so many seconds ago may have been cancelled unheard."""
        since = self.hears_since
        return since is not None and age > time.monotonic() - since

    def confirm(self, request_id: str, attempt: int) -> None:
        """The router wants this attempt."""
        if event := self._asked.get((request_id, attempt)):
            event.set()

    @contextmanager
    def asked(self, request_id: str, attempt: int, cancel_token: CancelToken) -> Iterator[Callable[[], bool]]:
        """Yield a function that waits for the answer and returns whether the attempt was confirmed. Ask in the block.

        Raises:
            FleetError: the attempt was cancelled.
        """
        answered = self._asked[request_id, attempt] = threading.Event()

        def is_confirmed() -> bool:
            confirmed = answered.wait(ANSWER_WITHIN if self.hears_since is not None else 0.0)
            if cancel_token.error is not None:
                raise cancel_token.error
            return confirmed

        try:
            with cancel_token.on_cancel(answered.set):
                yield is_confirmed
        finally:
            del self._asked[request_id, attempt]
