"""When a server starts again: at once after its first end, then after growing pauses. Pure: callers tell the time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds between the starts of a server."""

    first: float = 1.0
    """The pause before the start after the second death in `window`. Each further one doubles it."""
    longest: float = 60.0
    window: float = 600.0
    """A server that has served this long is forgiven what was before."""
    most_deaths: int = 5
    """So many deaths in `window` put a server into quarantine."""
    quarantine: float = 600.0
    """The pause between two tries in quarantine, and at most between two restarts that were asked for."""
    first_wish: float = 30.0
    """The pause after a restart that was asked for, until the next is allowed. Each further one doubles it."""


PACE = Pace()


class RestartPolicy:
    """Counts the deaths of one server, and the restarts for a fault of it or its memory.

    All times are of one clock, in seconds. Time that a server takes to start does not count for `Pace.window`: five
    servers that load for ten minutes and die then are five deaths in a row.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._deaths: deque[float] = deque(maxlen=pace.most_deaths)
        """The times of the last ones, on a clock that stands still while the server starts."""
        self._quarantined = False
        self._starting_since: float | None = None
        self._starting_for = 0.0
        self._served_since: float | None = None
        self._wishes = 0
        self._last_wish = 0.0

    @property
    def quarantined(self) -> bool:
        """True if the server died too often. It stays so until a server has served for `Pace.window`."""
        return self._quarantined

    @property
    def wish_allowed_at(self) -> float:
        """The time from which it may be restarted for a fault or its memory."""
        return self._last_wish + self._pause_of_wishes() if self._wishes else 0.0

    def started(self, now: float) -> None:
        self._starting_since = now

    def served(self, now: float) -> None:
        """It accepts connections."""
        self._end_of_start(now)
        self._served_since = now
        if self._wishes:
            self._last_wish = now

    def died(self, now: float) -> float:
        """Count an end that nobody asked for, or a start that failed. Return the seconds until the next start."""
        self._end_of_start(now)
        if self._served_since is not None and now - self._served_since >= self._pace.window:
            self.forgive()
        self._served_since = None
        clock = now - self._starting_for
        while self._deaths and self._deaths[0] <= clock - self._pace.window:
            self._deaths.popleft()
        self._deaths.append(clock)
        self._quarantined |= len(self._deaths) >= self._pace.most_deaths
        if self._quarantined:
            return self._pace.quarantine
        failures = len(self._deaths)
        return 0.0 if failures == 1 else min(self._pace.longest, self._pace.first * 2.0 ** min(failures - 2, 60))

    def stopped(self, now: float) -> None:
        """It has ended because it was told to."""
        self._end_of_start(now)
        self._served_since = None

    def wished(self, now: float) -> None:
        """It is restarted for a fault or its memory."""
        if self._wishes and now >= self.wish_allowed_at + self._pace.window:
            self._wishes = 0
        self._wishes += 1
        self._last_wish = now

    def forgive(self) -> None:
        """Forget all deaths and restarts."""
        self._deaths.clear()
        self._quarantined = False
        self._wishes = 0

    def _end_of_start(self, now: float) -> None:
        if self._starting_since is not None:
            self._starting_for += now - self._starting_since
            self._starting_since = None

    def _pause_of_wishes(self) -> float:
        return min(self._pace.quarantine, self._pace.first_wish * 2.0 ** min(self._wishes - 1, 60))
