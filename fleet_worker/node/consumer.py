"""Celery's consumer in a node: which messages it drops, and how it sends the events that Flower shows."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from celery.worker import consumer
from celery.worker import state as celery_state
from kombu import Message

from fleet_worker.broker.connection import BROKER_ERRORS, is_away
from fleet_worker.broker.outage import REFUSED_BACK_OFF
from fleet_worker.broker.refusal import refusal

log = logging.getLogger(__name__)

BROKEN_CONNECTION = (AttributeError, ValueError)
"""What Celery and py-amqp also raise when a connection breaks while it is set up: its socket is None, or closed."""
FLUSH_AFTER = 0.2
"""Seconds for which task events gather. Celery publishes them in each turn of its event loop: three messages for every
request, an eighth of what a node does at 300 requests a second."""
STEADY_AFTER = 5.0
"""Seconds after which a connection that breaks was not refused from its beginning."""


class Consumer(consumer.Consumer):  # type: ignore[misc]
    """Drops and logs a message that it cannot use, without quoting it: any Celery client may send one.

    Celery logs up to 1,024 characters of the body, all headers, which may show the arguments, and the errors of
    decoders, which hold what they could not decode.

    It sends task events in batches, always from the thread of its event loop, on the connection that it reads from.
    """

    _is_flush_due = False
    _refusals = 0
    _connected_at = 0.0

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

    # Reconnecting

    def connect(self) -> Any:
        connection = super().connect()
        self._connected_at = time.monotonic()
        return connection

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        super().on_connection_error_before_connected(exc)
        self._pause(exc)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        super().on_connection_error_after_connected(exc)
        self._pause(exc)

    def _pause(self, error: Exception) -> None:
        """Wait longer and longer while the broker refuses something. By itself Celery tries again at once, some ten
        times a second. A broker that is away is tried again at once: `connect` has pauses of its own."""
        if is_away(error) and not refusal(error):
            return
        if self._connected_at and time.monotonic() - self._connected_at >= STEADY_AFTER:
            self._refusals = 0
        self._connected_at = 0.0
        ends = time.monotonic() + REFUSED_BACK_OFF[min(self._refusals, len(REFUSED_BACK_OFF) - 1)]
        self._refusals += 1
        while time.monotonic() < ends and celery_state.should_stop is None:  # Celery has no event for that
            time.sleep(0.05)

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
