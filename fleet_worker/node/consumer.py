"""Celery's consumer in a node: which messages it drops, and how it sends the events that Flower shows."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from celery.worker import consumer
from celery.worker import state as celery_state
from celery.worker.state import maybe_shutdown
from kombu import Message

from fleet_worker.broker.door import NOT_JSON, Refused, read_json
from fleet_worker.broker.faults import BROKER_ERRORS, place_of
from fleet_worker.broker.outage import Outage
from fleet_worker.broker.redis_transport import Channel as RedisChannel
from fleet_worker.errors import InvalidRequest
from fleet_worker.protocol.prompt_prefixes import HEADER
from fleet_worker.protocol.request import Address

log = logging.getLogger(__name__)

BEAT_PREFIX = "registry."
TASK_PREFIXES = ("fleet.", BEAT_PREFIX)
"""Of the tasks that can be called. Celery has some of its own."""
NO_TASK = "it is no task"
NO_ADDRESS = "it is a task without a request that could be answered"
UNKNOWN_TASK = "its task is not one of this node"

BROKEN_CONNECTION = (AttributeError, ValueError)
"""What Celery and py-amqp also raise when a connection breaks while it is set up: its socket is None, or closed."""
FLUSH_AFTER = 0.2
"""Seconds for which task events gather. Celery publishes them in each turn of its event loop: three messages for every
request, an eighth of what a node does at 300 requests a second."""


class Consumer(consumer.Consumer):  # type: ignore[misc]
    """Refuses a message that it cannot use: any Celery client may send one.

    By itself Celery would log up to 1,024 characters of the body, all headers, which may show the arguments, and the
    errors of decoders, which hold what they could not decode; and it would end for some of them.

    It sends task events in batches, always from the thread of its event loop, on the connection that it reads from.
    """

    _is_flush_due = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._broker = f"the broker at {place_of(self.app.conf.broker_url)}"
        self._outage = Outage(self._broker, log)
        self.connection_errors = (*self.conninfo.connection_errors, *BROKEN_CONNECTION)

    # Messages

    def create_task_handler(self, *args: Any) -> Callable[[Message], None]:
        """Return Celery's handler of messages. It gets tasks of ours only, made anew from what was checked."""
        handle = super().create_task_handler(*args)
        ours = frozenset(name for name in self.app.tasks if name.startswith(TASK_PREFIXES))

        def open_and_handle(message: Message) -> None:
            if message.delivery_info.get("redelivered"):
                message.channel.send_again(message)
            else:
                _make_task(message, ours)
                try:
                    handle(message)
                except (*BROKER_ERRORS, Refused):
                    raise
                except Exception as error:
                    raise Refused(NO_TASK, type(error).__name__) from error

        return open_and_handle

    def on_unknown_message(self, body: Any, message: Message) -> None:
        raise Refused(NO_TASK)

    def on_unknown_task(self, body: Any, message: Message, exc: Exception) -> None:
        raise Refused(UNKNOWN_TASK)

    def on_invalid_task(self, body: Any, message: Message, exc: Exception) -> None:
        raise Refused(NO_TASK)

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        raise Refused(NOT_JSON)

    def call_soon_ack(self, acknowledge: Callable[..., object], *args: Any, **options: Any) -> Any:
        """Acknowledge a message whose task has ended, in the thread of the task.

        On Redis that is a note in memory, which any thread may make (says kombu's `QoS`). The event loop is woken only
        if it waits for a free slot: a turn of it takes 50 us or more.
        """
        channel = self.task_consumer.channel if self.task_consumer else None
        if not isinstance(channel, RedisChannel):
            return super().call_soon_ack(acknowledge, *args, **options)
        acknowledge(*args, **options)
        return self.call_soon(_wake_up) if channel.qos.is_full else None

    # Reconnecting: an outage is a few lines. Celery logs three for each try, with the user of broker_url.

    def connect(self) -> Any:
        connection = super().connect()
        if not self._outage.failures:
            log.info("connected to %s", self._broker)
        self._outage.works()
        self.timer.call_after(self._outage.steady_after + 0.1, self._outage.works, kwargs={"begins": False})
        return connection

    def ensure_connected(self, connection: Any) -> Any:
        connection.ensure_connection(lambda error, _: self._outage.failed(error), callback=maybe_shutdown)
        self.first_connection_attempt = False
        return connection

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        self._pause(self._outage.failed(exc))

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        super().on_connection_error_after_connected(exc)
        self._pause(self._outage.failed(exc))

    def _pause(self, seconds: float) -> None:
        """By itself Celery tries again at once, some ten times a second if the broker refuses something."""
        ends = time.monotonic() + seconds
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


def _wake_up() -> None:
    """Have the event loop look again whether a slot is free."""


def _make_task(message: Message, ours: frozenset[str]) -> None:
    """Replace everything that Celery reads of a message: its id and its arguments follow from the envelope alone, and
    from the header of its prefixes, which is the second argument if it is there.

    So no sender decides about time limits, an ETA, callbacks or other tasks to call, and none needs to be trusted.

    Raises:
        Refused: it is no task of this node.
    """
    task = message.headers.get("task")
    if not isinstance(task, str) or task not in ours:
        raise Refused(UNKNOWN_TASK, task if isinstance(task, str) else "")
    content = read_json(message.body)
    args, kwargs, _ = content if isinstance(content, list) and len(content) == 3 else (None, None, None)
    if not isinstance(args, list) or kwargs:
        raise Refused(NO_TASK)
    if task.startswith(BEAT_PREFIX):
        task_id, args = task, []
    else:
        try:
            (envelope,) = args
            task_id = Address.of(envelope).request_id
        except (ValueError, InvalidRequest):
            raise Refused(NO_ADDRESS) from None
        if HEADER in message.headers:
            args = [envelope, message.headers[HEADER]]
    message.headers = {"id": task_id, "root_id": task_id, "task": task, "retries": 0, "ignore_result": True}
    message.properties = {"correlation_id": task_id, "priority": message.properties.get("priority")}
    message.content = args, {}, None
