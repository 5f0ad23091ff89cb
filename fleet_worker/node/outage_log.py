"""How the log of a node tells of a broker that is away: one line when it goes, one a minute, one when it is back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from celery.worker.consumer.consumer import CONNECTION_ERROR, CONNECTION_RETRY

from fleet_worker.broker.connection import place_of

__all__ = ["TOLD_EVERY", "Outage"]

TOLD_EVERY = 60.0
CONNECTED = "Connected to %s"


class Outage:
    """A filter for what Celery logs of the connection on which it takes work: three lines at each of its tries, with
    the user of broker_url.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._place = "?"
        self._since: float | None = None
        self._told = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        match record.msg, record.args:
            case str(said), (str(url),) if said == CONNECTED:
                self._connected(record, place_of(url))
            case str(said), (str(url), BaseException() as error, _) if said == CONNECTION_ERROR:
                self._place = place_of(url)
                return self._is_away(record, error)
            case _, (str(said), BaseException() as error) if said == CONNECTION_RETRY:
                return self._is_away(record, error)
        return True

    def _connected(self, record: logging.LogRecord, place: str) -> None:
        if self._since is None:
            record.msg, record.args = "connected to the broker at %s", (place,)
        else:
            _warn(record, "the broker at %s is back after %.0f s", place, self._clock() - self._since)
        self._place, self._since = place, None

    def _is_away(self, record: logging.LogRecord, error: BaseException) -> bool:
        """Only its kind is told: the text of an error may quote anything."""
        now, kind = self._clock(), type(error.__cause__ or error).__name__
        if self._since is None:
            self._since = now
            _warn(record, "the broker at %s is away (%s), and is tried again until it is back", self._place, kind)
        elif now - self._told >= TOLD_EVERY:
            _warn(record, "the broker at %s is still away, for %.0f s now (%s)", self._place, now - self._since, kind)
        else:
            return False
        self._told = now
        return True


def _warn(record: logging.LogRecord, message: str, *args: object) -> None:
    record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
    record.msg, record.args = message, args
