"""What may be logged: never a prompt, a completion, a vector, a key or a token."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from celery import Celery, signals
from celery.worker import consumer, request
from celery.worker.consumer.consumer import CONNECTION_ERROR, CONNECTION_RETRY
from kombu import Message

from fleet_worker.broker.connection import place_of

_LEAST_LEVELS = {
    "celery.worker.strategy": logging.WARNING,  # "received": one line a task, when it ends, is enough
    "celery.pool": logging.INFO,  # DEBUG shows the arguments of every task
    "httpcore": logging.INFO,  # DEBUG shows headers, so keys
    "httpx": logging.WARNING,  # INFO is a line per request
    "kombu": logging.INFO,
    "amqp": logging.INFO,
}


_CONNECTION = "celery.worker.consumer.connection"


class Request(request.Request):  # type: ignore[misc]
    """A task's message as Celery's worker holds it. Logs, events, `celery inspect` and Flower see no arguments of it.

    Instead they see the lane, whatever the sender, which may be any Celery client, put into the message's headers.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._argsrepr, self._kwargsrepr = self.delivery_info["routing_key"] or "-", ""

    def info(self, safe: bool = False) -> dict[str, Any]:
        """Return what the remote-control commands show: `active`, `reserved`, `scheduled` and `query_task`."""
        return {**super().info(safe=True), "args": "-", "kwargs": "-"}


class Consumer(consumer.Consumer):  # type: ignore[misc]
    """Celery's consumer, which logs a message that it cannot use without quoting it.

    Celery logs up to 1,024 characters of the body, all headers, which may show the arguments, and the error of the
    decoder, which holds the whole body.
    """

    def on_unknown_message(self, body: Any, message: Message) -> None:
        super().on_unknown_message(None, _redacted(message))

    def on_unknown_task(self, body: Any, message: Message, exc: Exception) -> None:
        message = _redacted(message)
        # Celery reads both, and an error here would end the worker.
        message.headers = {"id": None, "task": str(exc), **message.headers}
        super().on_unknown_task(None, message, exc)

    def on_invalid_task(self, body: Any, message: Message, exc: Exception) -> None:
        super().on_invalid_task(None, _redacted(message), exc)

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        super().on_decode_error(_redacted(message), "not JSON")


def _redacted(message: Message) -> Message:
    headers = message.headers if isinstance(message.headers, dict) else {}
    message.headers = {key: headers[key] for key in ("id", "task", "root_id") if key in headers}
    message.body = f"{len(message.body)} bytes, not shown"
    return message


def protect_logs() -> None:
    """Keep arguments, keys and false alarms out of what the libraries log in this process."""
    _quieten()
    signals.after_setup_logger.connect(_quieten, weak=False)  # --loglevel DEBUG must not undo it
    for name, quieter in _FILTERS.items():
        logging.getLogger(name).addFilter(quieter)


def begin_log(app: Celery, node_name: str, options: dict[str, Any]) -> None:
    """Set logging up as Celery does with these options of its command line, but before the node begins: it may have to
    wait, or end, and say so."""
    name_lines(app, node_name)
    no_color = options.get("no_color")
    colorize = None if no_color is None else not no_color
    app.log.setup(options.get("loglevel"), options.get("logfile"), colorize=colorize, hostname=node_name)


def name_lines(app: Celery, node_name: str) -> None:
    """Say in every line which node logs it, where Celery says MainProcess: all nodes of a host may share a log."""
    name = node_name.replace("%", "%%")
    for setting in ("worker_log_format", "worker_task_log_format"):
        app.conf[setting] = app.conf[setting].replace("%(processName)s", name)


def _quieten(loglevel: int | str | None = None, **_: Any) -> None:
    """Our own few lines are shown at WARNING too, which is the level of `celery worker` if nobody says another."""
    level = logging.getLevelName(loglevel) if isinstance(loglevel, str) else loglevel or logging.WARNING
    for name in ("fleet_worker", _CONNECTION):  # which says that the broker is back
        logging.getLogger(name).setLevel(level if level > logging.WARNING else min(level, logging.INFO))
    for name, level in _LEAST_LEVELS.items():
        logger = logging.getLogger(name)
        logger.setLevel(max(level, logger.level))


def _calm(record: logging.LogRecord) -> bool:
    """RabbitMQ delivers again what was not acknowledged before its connection was lost. Celery calls that critical."""
    if str(record.msg).startswith("Couldn't ack "):
        record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
        record.msg = "the broker was away while a request ran, and delivers it again: harmless, nobody hears it twice"
        record.args = record.exc_info = None
    return True


def _no_false_alarm(record: logging.LogRecord) -> bool:
    """Celery warns at every loss of its connection that it might cancel what runs, some day, if nobody says no."""
    return "worker_cancel_long_running_tasks_on_connection_loss" not in record.getMessage()


def _no_beat(record: logging.LogRecord) -> bool:
    """That a registry node has beaten once more is nothing new; that it failed is."""
    is_beat = str(getattr(record, "data", {}).get("name")).startswith("registry.publish_")
    return record.levelno > logging.INFO or not is_beat


TOLD_EVERY = 60.0


CONNECTED = "Connected to %s"


class OutageFilter:
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


_outage = OutageFilter()
_FILTERS: dict[str, Callable[[logging.LogRecord], bool] | OutageFilter] = {
    "celery.worker.request": _calm,
    "py.warnings": _no_false_alarm,
    "celery.app.trace": _no_beat,
    "celery.worker.consumer.consumer": _outage,
    _CONNECTION: _outage,
}
