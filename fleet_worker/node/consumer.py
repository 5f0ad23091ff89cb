"""Celery's consumer in a node: which messages it drops, and how it sends the events that Flower shows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery.worker import consumer
from kombu import Message

from fleet_worker.broker.connection import BROKER_ERRORS

log = logging.getLogger(__name__)

BROKEN_CONNECTION = (AttributeError, ValueError)
"""What Celery and py-amqp also raise when a connection breaks while it is set up: its socket is None, or closed."""
FLUSH_AFTER = 0.2
"""Seconds for which task events gather. Celery publishes them in each turn of its event loop: three messages for every
request, an eighth of what a node does at 300 requests a second."""


class Consumer(consumer.Consumer):  # type: ignore[misc]
    """Drops and logs a message that it cannot use, without quoting it: any Celery client may send one.

    Celery logs up to 1,024 characters of the body, all headers, which may show the arguments, and the errors of
    decoders, which hold what they could not decode.

    It sends task events in batches, always from the thread of its event loop, on the connection that it reads from.
    """

    _is_flush_due = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.connection_errors = (*self.conninfo.connection_errors, *BROKEN_CONNECTION)

    # Messages

    def create_task_handler(self, *args: Any) -> Callable[[Message], None]:
        """Return Celery's handler of messages. By itself it would end the worker for one that is no task."""
        handle = super().create_task_handler(*args)

        def handle_or_drop(message: Message) -> None:
            try:
                handle(message)
            except BROKER_ERRORS:
                raise
            except Exception as error:
                self.on_invalid_task(None, message, error)

        return handle_or_drop

    def on_unknown_message(self, body: Any, message: Message) -> None:
        super().on_unknown_message(None, _redacted(message))

    def on_unknown_task(self, body: Any, message: Message, exc: Exception) -> None:
        message = _redacted(message)
        # Celery reads both, and an error here would end the worker.
        message.headers = {"id": None, "task": str(exc), **message.headers}
        super().on_unknown_task(None, message, exc)

    def on_invalid_task(self, body: Any, message: Message, exc: Exception) -> None:
        log.error("Received invalid task message (%s): %d bytes, not shown", type(exc).__name__, len(message.body))
        message.reject_log_error(log, self.connection_errors)

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        super().on_decode_error(_redacted(message), "not JSON")

    # Events

    def connection_for_read(self, heartbeat: float | None = None) -> Any:
        # RabbitMQ: a confirmation would be waited for inside the event loop, and nobody needs one of an event.
        options = {"confirm_publish": False}
        return self.ensure_connected(self.app.connection_for_read(heartbeat=heartbeat, transport_options=options))

    def connection_for_write(self, url: str | None = None, heartbeat: float | None = None) -> Any:
        """Return the connection that it reads from. Celery opens another for events."""
        return self.connection

    def register_with_event_loop(self, hub: Any) -> None:
        super().register_with_event_loop(hub)
        self._is_flush_due = False  # a flush that was due is lost with the connection

    def on_send_event_buffered(self) -> None:
        """Called in the thread of a task; only the event loop's own thread may use its timers."""
        if not self._is_flush_due:
            self._is_flush_due = True
            self.hub.call_soon(self.hub.call_later, FLUSH_AFTER, self._flush)

    def _flush(self) -> None:
        self._is_flush_due = False
        if self.event_dispatcher:
            self.event_dispatcher.flush()


def _redacted(message: Message) -> Message:
    headers = message.headers if isinstance(message.headers, dict) else {}
    message.headers = {key: headers[key] for key in ("id", "task", "root_id") if key in headers}
    message.body = f"{len(message.body)} bytes, not shown"
    return message
