"""What may be logged: never a prompt, a completion, a vector, a key or a token."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from celery import Celery, signals
from celery.worker.consumer.consumer import CONNECTION_ERROR, CONNECTION_RETRY

from fleet_worker.broker.faults import describe, place_of, refusal

OUTAGE_LOGGED_EVERY = 60.0
"""Seconds between two lines about a broker that stays away."""
REFUSED_AGAIN_WITHIN = 10.0
"""Seconds in which a broker that refused something is not called back when it can be connected to: it will refuse the
same again."""
_CONNECTION = "celery.worker.consumer.connection"
_CONNECTED = "Connected to %s"
_LOWEST_LEVELS = {
    "celery.worker.strategy": logging.WARNING,  # INFO is a line for each received task; the line at its end is enough
    "celery.pool": logging.INFO,  # DEBUG shows the arguments of every task
    "httpcore": logging.INFO,  # DEBUG shows headers, so keys
    "httpx": logging.WARNING,  # INFO is a line for each request
    "kombu": logging.INFO,
    "amqp": logging.INFO,
}


def protect_logs() -> None:
    """Keep arguments, keys and false alarms out of what the libraries log in this process."""
    _set_levels()
    signals.after_setup_logger.connect(_set_levels, weak=False)  # --loglevel DEBUG must not undo it
    for name, log_filter in _FILTERS.items():
        logging.getLogger(name).addFilter(log_filter)


def begin_log(app: Celery, node_name: str, options: dict[str, Any]) -> None:
    """Set logging up as Celery does with these options of its command line, but before the node begins: it may have to
    wait, or to end, and log why."""
    name_lines(app, node_name)
    no_color = options.get("no_color")
    colorize = None if no_color is None else not no_color
    app.log.setup(options.get("loglevel"), options.get("logfile"), colorize=colorize, hostname=node_name)


def name_lines(app: Celery, node_name: str) -> None:
    """Log the node's name where Celery logs MainProcess: all nodes of a host may share a log."""
    name = node_name.replace("%", "%%")
    for setting in ("worker_log_format", "worker_task_log_format"):
        app.conf[setting] = app.conf[setting].replace("%(processName)s", name)


def _set_levels(loglevel: int | str | None = None, **_: Any) -> None:
    """Show our own few lines, and that the broker is back, at WARNING too: the default level of `celery worker`."""
    level = logging.getLevelName(loglevel) if isinstance(loglevel, str) else loglevel or logging.WARNING
    for name in ("fleet_worker", _CONNECTION):
        logging.getLogger(name).setLevel(level if level > logging.WARNING else min(level, logging.INFO))
    for name, level in _LOWEST_LEVELS.items():
        logger = logging.getLogger(name)
        logger.setLevel(max(level, logger.level))


class OutageFilter:
    """Filters what Celery logs of its connection: at each try three lines, with the user of broker_url.

    An outage becomes one line when the broker goes, one every minute, and one when it is back. What the broker refuses
    is one line that names it, and one every minute.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._place = "?"
        self._away_since: float | None = None
        self._last_logged = 0.0
        self._why = ""
        self._refused_at = float("-inf")
        """When a connection that had been made was refused something."""

    def filter(self, record: logging.LogRecord) -> bool:
        match record.msg, record.args:
            case str(message), (str(url),) if message == _CONNECTED:
                return self._connected(record, place_of(url))
            case str(message), (str(url), BaseException() as error, _) if message == CONNECTION_ERROR:
                self._place = place_of(url)
                return self._away(record, error)
            case _, (str(message), BaseException() as error) if message == CONNECTION_RETRY:
                if refusal(error):
                    self._refused_at = self._clock()
                return self._away(record, error)
        return True

    def _connected(self, record: logging.LogRecord, place: str) -> bool:
        if self._clock() - self._refused_at < REFUSED_AGAIN_WITHIN:
            return False
        if self._away_since is None:
            record.msg, record.args = "connected to the broker at %s", (place,)
        else:
            seconds = self._clock() - self._away_since
            _change_to_warning(record, "the broker at %s is back after %.0f s", place, seconds)
        self._place, self._away_since = place, None
        return True

    def _away(self, record: logging.LogRecord, error: BaseException) -> bool:
        now, place, why = self._clock(), self._place, describe(error)
        is_new = self._away_since is None or (why != self._why and not why.startswith("is away"))
        if self._away_since is None:
            self._away_since = now
        if is_new:
            _change_to_warning(record, "the broker at %s %s; it is tried again until that is over", place, why)
        elif now - self._last_logged >= OUTAGE_LOGGED_EVERY:
            seconds = now - self._away_since
            _change_to_warning(record, "the broker at %s %s, for %.0f s now", place, why, seconds)
        else:
            return False
        self._last_logged, self._why = now, why
        return True


def _explain_lost_ack(record: logging.LogRecord) -> bool:
    """RabbitMQ delivers again what was not acknowledged before its connection was lost. Celery calls that critical."""
    if str(record.msg).startswith("Couldn't ack "):
        message = "the broker was away while a request ran, and delivers it again: harmless, one answer counts"
        _change_to_warning(record, message)
        record.exc_info = None
    return True


def _drop_cancel_warning(record: logging.LogRecord) -> bool:
    """Drop Celery's warning, at every lost connection, that a future version may cancel running tasks."""
    return "worker_cancel_long_running_tasks_on_connection_loss" not in record.getMessage()


def drop_beats(record: logging.LogRecord) -> bool:
    """Drop the line for each task of a registry node's schedule, unless it failed. For the log "celery.app.trace"."""
    is_beat = str(getattr(record, "data", {}).get("name")).startswith("registry.publish_")
    return record.levelno > logging.INFO or not is_beat


def _change_to_warning(record: logging.LogRecord, message: str, *args: object) -> None:
    record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
    record.msg, record.args = message, args


_outage = OutageFilter()
_FILTERS: dict[str, Callable[[logging.LogRecord], bool] | OutageFilter] = {
    "celery.worker.request": _explain_lost_ack,
    "py.warnings": _drop_cancel_warning,
    "celery.worker.consumer.consumer": _outage,
    _CONNECTION: _outage,
}
