"""What is logged of a connection that fails, and how long to wait before the next try."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from fleet_worker.broker.connection import BACK_OFF
from fleet_worker.broker.faults import describe, needs_operator, refusal

REFUSED_BACK_OFF = (*BACK_OFF, 5.0)
"""Seconds before each further try at a broker that refuses; the last one from then on."""
STEADY_AFTER, STEADY_AFTER_REFUSAL = 1.0, 10.0
"""Seconds that a connection has to work until the broker counts as back. What a broker refuses may be asked of it only
seconds after the connection was made."""
LOGGED_EVERY = 60.0
"""Seconds between two lines about the same failure."""


class Outage:
    """Counts the failures of one connection. It logs one line when it begins to fail, one for each new reason, one
    every minute with the seconds so far, and one when it has worked again for `steady_after` seconds. For one thread.

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
        self._failing_since = 0.0
        self._works_since: float | None = None
        self._was_refused = False
        self._tries = 0
        """Since it last worked, or was refused."""
        self._reason = ""
        """The last one that was logged."""
        self._logged_at = 0.0

    @property
    def steady_after(self) -> float:
        return STEADY_AFTER_REFUSAL if self._was_refused else STEADY_AFTER

    def failed(self, error: BaseException) -> float:
        """Log the failure, unless that was done. Return the seconds to wait before the next try."""
        self.works(begins=False)
        had_worked, self._works_since = self._works_since is not None, None
        refused, now, reason = refusal(error) or needs_operator(error), self._clock(), describe(error)
        if not self.failures:
            self._failing_since = now
        self.failures += 1
        self._was_refused |= bool(refused)
        if (refused or not self._is_quiet()) and (self._is_new(reason) or now - self._logged_at >= LOGGED_EVERY):
            since = "" if self._is_new(reason) else f", for {now - self._failing_since:.0f} s now"
            self._log.warning("%s %s%s; it is tried again", self._subject, reason, since)
            self._reason, self._logged_at = reason, now
        pauses = REFUSED_BACK_OFF if refused else BACK_OFF
        # A connection that worked for a moment is lost, not refused: it is tried again at once, however often.
        self._tries = 1 if had_worked and not refused else self._tries + 1
        return pauses[min(self._tries, len(pauses)) - 1]

    def works(self, *, begins: bool = True) -> None:
        """The connection works: to be called now and then, as long as it does."""
        now = self._clock()
        if self._works_since is None:
            self._works_since = now if begins else None
        elif self.failures and now - self._works_since >= self.steady_after:
            self.failures, self._tries, self._was_refused = 0, 0, False
            if self._reason:
                self._log.warning("%s is back after %.0f s", self._subject, self._works_since - self._failing_since)
                self._reason = ""

    def _is_new(self, reason: str) -> bool:
        """Whether it was not logged last. The kind of error of a broker that is away may differ from try to try."""
        return reason != self._reason and not (reason.startswith("is away") and self._reason.startswith("is away"))
