"""What is logged of a connection that fails, and how long to wait before the next try."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from fleet_worker.broker.connection import BACK_OFF
from fleet_worker.broker.faults import describe, needs_operator, refusal

REFUSED_BACK_OFF = (*BACK_OFF, 5.0)
"""Seconds before each further try at a broker that refuses; the last one from then on."""
STEADY_AFTER = 1.0
"""Seconds that a connection has to work until the broker counts as back."""
LOGGED_EVERY = 60.0
"""Seconds between two lines about the same failure."""


class Outage:
    """Counts the failures of one connection. It logs one line when it begins to fail, one for each new reason, one
    every minute, and one when it has worked again for `STEADY_AFTER` seconds. For one thread.

    `subject` begins each line, as in "the reply queue: the broker". `is_quiet` returns True as long as a broker that is
    away is not to be logged here; what it refuses always is.
    """

    def __init__(
        self,
        subject: str,
        log: logging.Logger,
        *,
        is_quiet: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._subject = subject
        self._log = log
        self._is_quiet = is_quiet
        self._clock = clock
        self.failures = 0
        self._reason = ""
        """The last one that was logged."""
        self._logged_at = 0.0
        self._works_since: float | None = None

    def failed(self, error: BaseException) -> float:
        """Log the failure, unless that was done. Return the seconds to wait before the next try."""
        self.works(begins=False)
        self._works_since = None
        refused, now = refusal(error) or needs_operator(error), self._clock()
        reason = describe(error)
        is_new = reason != self._reason or now - self._logged_at >= LOGGED_EVERY
        if is_new and (refused or not self._is_quiet()):
            self._reason, self._logged_at = reason, now
            self._log.warning("%s %s", self._subject, reason)
        pauses = REFUSED_BACK_OFF if refused else BACK_OFF
        self.failures += 1
        return pauses[min(self.failures, len(pauses)) - 1]

    def works(self, *, begins: bool = True) -> None:
        """The connection works: to be called now and then, as long as it does."""
        now = self._clock()
        if self._works_since is None:
            self._works_since = now if begins else None
        elif self.failures and now - self._works_since >= STEADY_AFTER:
            self.failures = 0
            if self._reason:
                self._log.warning("%s is back", self._subject)
                self._reason = ""
