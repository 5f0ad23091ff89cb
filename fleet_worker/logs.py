"""What may be logged: never a prompt, a completion, a vector, a key or a token."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import celery.worker.consumer.consumer as celery_consumer
from celery import signals
from celery.worker.control import Panel

__all__ = ["protect_logs"]

_LEAST_LEVELS = {
    "celery.pool": logging.INFO,  # DEBUG shows the arguments of every task
    "httpcore": logging.INFO,  # DEBUG shows headers, so keys
    "httpx": logging.WARNING,  # INFO is a line per request
    "kombu": logging.INFO,
    "amqp": logging.INFO,
}


def protect_logs() -> None:
    """Keep bodies and arguments out of this process's logs, and of what `celery inspect` and Flower may ask it."""
    _quieten()
    signals.after_setup_logger.connect(_quieten, weak=False)  # --loglevel DEBUG must not undo it
    # Celery logs up to 1,024 characters of a message that it does not know or cannot decode.
    celery_consumer.dump_body = lambda message, body: f"({len(message.body)}b, not shown)"
    for command in ("active", "reserved", "scheduled", "query_task"):
        Panel.data[command] = _without_arguments(Panel.data[command])


def _quieten(**_: Any) -> None:
    for name, level in _LEAST_LEVELS.items():
        logger = logging.getLogger(name)
        logger.setLevel(max(level, logger.level))


def _without_arguments(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same remote-control command with the arguments of tasks hidden."""

    def redacted(*args: Any, **kwargs: Any) -> Any:
        return _redact(command(*args, **kwargs))

    return redacted


def _redact(answer: Any) -> Any:
    if isinstance(answer, dict):
        return {key: "-" if key in ("args", "kwargs") else _redact(value) for key, value in answer.items()}
    if isinstance(answer, list | tuple):
        return [_redact(each) for each in answer]
    return answer
