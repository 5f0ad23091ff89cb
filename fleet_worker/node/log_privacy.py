"""What may be logged: never a prompt, a completion, a vector, a key or a token."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery import Celery, signals
from celery.worker.consumer.consumer import CONNECTION_RETRY

_LOWEST_LEVELS = {
    "celery.worker.strategy": logging.WARNING,  # INFO is a line for each received task; the line at its end is enough
    "celery.worker.consumer.connection": logging.WARNING,  # INFO is a line with the user of broker_url
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
    """Show our own few lines at WARNING too: the default level of `celery worker`."""
    level = logging.getLevelName(loglevel) if isinstance(loglevel, str) else loglevel or logging.WARNING
    logging.getLogger("fleet_worker").setLevel(level if level > logging.WARNING else min(level, logging.INFO))
    for name, level in _LOWEST_LEVELS.items():
        logger = logging.getLogger(name)
        logger.setLevel(max(level, logger.level))


def _explain_lost_ack(record: logging.LogRecord) -> bool:
    """RabbitMQ delivers again what was not acknowledged before its connection was lost. Celery calls that critical."""
    if str(record.msg).startswith("Couldn't ack "):
        message = "the broker was away while a request ran, and delivers it again: harmless, one answer counts"
        record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
        record.msg, record.args, record.exc_info = message, (), None
    return True


def _drop_cancel_warning(record: logging.LogRecord) -> bool:
    """Drop Celery's warning, at every lost connection, that a future version may cancel running tasks."""
    return "worker_cancel_long_running_tasks_on_connection_loss" not in record.getMessage()


def drop_beats(record: logging.LogRecord) -> bool:
    """Drop the line for each task of a registry node's schedule, unless it failed. For the log "celery.app.trace"."""
    is_beat = str(getattr(record, "data", {}).get("name")).startswith("registry.publish_")
    return record.levelno > logging.INFO or not is_beat


def _drop_lost_connection(record: logging.LogRecord) -> bool:
    """Drop Celery's line about a lost connection: `Consumer` logs one for each outage."""
    return not (isinstance(record.args, tuple) and CONNECTION_RETRY in record.args)


_FILTERS: dict[str, Callable[[logging.LogRecord], bool]] = {
    "celery.worker.request": _explain_lost_ack,
    "py.warnings": _drop_cancel_warning,
    "celery.worker.consumer.consumer": _drop_lost_connection,
}
